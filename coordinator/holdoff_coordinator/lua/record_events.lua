-- Counts events, each once, and makes quiet what has to be.
-- ARGV 7   JSON: {id, age_us, count, budgets, shown, error, block, cause} an event.
--         `shown` is kept for people. `error` is {token, place, touched}: where an
--         error or a block was met, and for whom that is remembered. `block` is {id, token, division,
--         endpoint, reason, retry_after_us, sent_age_us, first_us, factor, most_us,
--         forget_us}, -1 for what was not told. `cause` is {job, host, user, status}.
-- Answers one word an event: COUNTED, KNOWN, TOO_MANY_EVENTS or TOO_MANY_BUDGETS.
expire_reservations()

-- What else follows from an event that was counted.
local function take_in(event, at)
  if event.error then
    probes_err(event.error.token, event.error.place, at)
    for _, who in ipairs(event.error.touched) do touch(who, event.error.place) end
  end
  if event.block then block(event, at) end
  if event.shown ~= '' then
    redis.call('XADD', SHARD .. ':errors', 'MAXLEN', '~', 1000, '*', 'at_us', us(at), 'event', event.shown)
    keep(SHARD .. ':errors', TOUCHED_US)
  end
end

local answers = {}
for i, event in ipairs(cjson.decode(ARGV[7])) do
  local at = now - event.age_us
  cause = event.cause
  answers[i] = count_event(event.id, at, event.count, event.budgets)
  if answers[i] == 'COUNTED' then spare('events/' .. event.id, take_in, event, at) end
end
return reply('OK', answers)
