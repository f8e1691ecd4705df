-- Reads budgets as they are at this instant.
-- ARGV 7.. budget ids
-- Answers one {id, budget, when there is room for one more} a budget
-- with something left in its window.
expire_reservations()
local found = {}
local function read(id)
  local budget = load_budget(id)
  local in_use = tonumber(redis.call('ZSCORE', BUDGETS, id) or 0) > sure
  if budget.limit and in_use then found[#found + 1] = shown_budget(id, budget, 1) end
end
for i = 7, #ARGV do spare('budgets/' .. ARGV[i], read, ARGV[i]) end
return reply('OK', found)
