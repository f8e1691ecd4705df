-- Ends a back-off, whatever it comes from; those who kept it follow one by one.
-- ARGV 7.. back-off id, why, who
local one = back_offs()[ARGV[7]]
if not one then return reply('BACK_OFF_NOT_FOUND') end
put(back_off_key(one.id), one, {
  until_us = math.min(number(one.until_us), now), clear_reason = ARGV[8], cleared_by = ARGV[9],
})
reopen(one)
audit_back_off('BACK_OFF_CLEARED', one, {reason = ARGV[8], user = ARGV[9]})
return reply('OK', shown_back_off(one))
