-- Counts events, each once.
-- ARGV 5   JSON: {id, age_us, count, budgets, shown} an event; `shown` is kept for
--         people if the event is an error
-- Answers one word an event: COUNTED, KNOWN, TOO_MANY_EVENTS or TOO_MANY_BUDGETS.
expire_reservations()
local answers = {}
for i, event in ipairs(cjson.decode(ARGV[5])) do
  local at = now - event.age_us
  answers[i] = count_event(event.id, at, event.count, event.budgets)
  if answers[i] == 'COUNTED' and event.shown ~= '' then
    redis.call('XADD', SHARD .. ':errors', 'MAXLEN', '~', 1000, '*', 'at_us', us(at), 'event', event.shown)
  end
end
return reply('OK', answers)
