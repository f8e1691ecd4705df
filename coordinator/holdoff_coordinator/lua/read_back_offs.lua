-- Reads the back-offs that are not over.
-- ARGV 5   token id, ' ' for those that belong to no token; '' for all back-offs
-- ARGV 6   places of its calls as JSON
-- ARGV 7   hash of the job's name or ''
local list = {}
if ARGV[5] == '' then
  for _, one in pairs(back_offs()) do list[#list + 1] = shown_back_off(one) end
else
  for _, one in ipairs(subject_to(ARGV[5], places_of(ARGV[6], ARGV[7]))) do list[#list + 1] = shown_back_off(one) end
end
return reply('OK', list)
