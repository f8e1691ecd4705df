-- Counts events, each once, and makes quiet what has to be.
-- ARGV 7   JSON: {id, token, age_us, count, budgets, shown, error, block, cause} an event.
--         `shown` is kept for people. `error` is {place, touched}: where an
--         error or a block was met, and for whom that is remembered. `block` is {id, token, division,
--         endpoint, spelled, reason, retry_after_us, sent_age_us, first_us, factor, most_us,
--         forget_us, by, own, for_app, lease}, -1 for what is not known: `own` is the id of the
--         back-off of the token `by` alone, `for_app` says that the reporter may report for the
--         whole app, and `lease` is the lease of the token that the reporter has proved to hold.
--         `cause` is {job, host, user, status}.
-- Answers one word an event: COUNTED, KNOWN, or TOO_MANY_EVENTS if its token has too many.
local ERRORS_MOST = 200 -- of a token that are kept
expire_reservations()

-- What else follows from an event that was counted.
local function take_in(event, at)
  if event.error then
    probes_err(event.token, event.error.place, at)
    for _, who in ipairs(event.error.touched) do touch(event.token, who, event.error.place) end
  end
  if event.block then block(event.block, at) end
  if event.shown ~= '' then
    local errors, erring = SHARD .. ':errors:' .. event.token, SHARD .. ':erring'
    event.shown.endpoint = spelling(event.token, event.error.place[2], event.shown.endpoint)
    local shown = cjson.encode(event.shown)
    redis.call('XADD', errors, 'MAXLEN', '~', ERRORS_MOST, '*', 'at_us', us(at), 'event', shown)
    redis.call('ZADD', erring, us(now), event.token)
    redis.call('ZREMRANGEBYSCORE', erring, '-inf', us(now - TOUCHED_US))
    for _, key in ipairs({errors, erring}) do keep(key, TOUCHED_US) end
  end
end

local answers = {}
for i, event in ipairs(cjson.decode(ARGV[7])) do
  local at = now - event.age_us
  cause = event.cause
  cause.from = event.token
  answers[i] = count_event(event.id, at, event.count, event.budgets, event.token)
  if answers[i] == 'COUNTED' then spare('events/' .. event.id, take_in, event, at) end
end
return reply('OK', answers)
