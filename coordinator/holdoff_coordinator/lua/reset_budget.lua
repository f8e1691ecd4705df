-- Forgets what a budget counted; the ids stay known, so that no late report
-- counts again. Reservations keep their room.
-- ARGV 7.. budget id, who, why
expire_reservations()
local id = ARGV[7]
local budget = load_budget(id)
if not budget.limit then return reply('BUDGET_NOT_FOUND') end
redis.call('DEL', log_key(id), weights_key(id))
put(budget_key(id), budget, {used = 0, reset_us = now, reset_by = ARGV[8], reset_reason = ARGV[9]})
-- A late commit must find that its event was forgotten, as long as it may come.
keep_budget(id, 2 * OLDEST_US + number(budget.window_us))
moved('budget ' .. id)
audit('BUDGET_RESET', '/budgets/' .. id, {
  reason = ARGV[9], user = ARGV[8], limit = budget.limit, token = budget.token,
  division = budget.division, endpoint = budget.spelled or budget.endpoint,
}, true)
if back_offs()[id] then
  put(back_off_key(id), found[id], {until_us = math.min(number(found[id].until_us), now)})
  reopen(found[id])
end
return reply('OK', shown_budget(id, budget, 1))
