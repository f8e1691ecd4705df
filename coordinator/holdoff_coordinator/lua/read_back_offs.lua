-- Reads the back-offs that are not over.
-- ARGV 7   token id, ' ' for those that belong to no token; '' for all back-offs
-- ARGV 8   places of its calls as JSON
-- ARGV 9   hash of the job's name or ''
local list = {}
local function show(one) list[#list + 1] = shown_back_off(one) end
if ARGV[7] == '' then
  for _, one in pairs(back_offs()) do spare('backOffs/' .. one.id, show, one) end
else
  for _, one in ipairs(subject_to(ARGV[7], places_of(ARGV[7], ARGV[8], ARGV[9]))) do
    spare('backOffs/' .. one.id, show, one)
  end
end
return reply('OK', list)
