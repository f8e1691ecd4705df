-- Ends a back-off, whatever it comes from; those who kept it follow one by one.
-- ARGV 5.. back-off id, why, who
local one = back_offs()[ARGV[5]]
if not one then return reply('BACK_OFF_NOT_FOUND') end
put(back_off_key(one.id), one, {
  until_us = math.min(number(one.until_us), now), clear_reason = ARGV[6], cleared_by = ARGV[7],
})
reopen(one)
return reply('OK', shown_back_off(one))
