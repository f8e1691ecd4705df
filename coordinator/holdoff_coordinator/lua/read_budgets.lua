-- Reads budgets as they are at this instant.
-- ARGV 7.. budget ids
-- Answers one {id, budget, when there is room for one more} a budget
-- with something left in its window.
expire_reservations()
local found = {}
for i = 7, #ARGV do
  local budget = load_budget(ARGV[i])
  local in_use = tonumber(redis.call('ZSCORE', BUDGETS, ARGV[i]) or 0) > now
  if budget.limit and in_use then found[#found + 1] = shown_budget(ARGV[i], budget, 1) end
end
return reply('OK', found)
