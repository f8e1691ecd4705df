-- Ends the quarantine before its time: an operator knows that nothing is lost.
-- ARGV 7.. why, who
-- Answers the shard as it is afterwards.
if number(shard.quarantine_until_us) <= now then return reply('QUARANTINE_NOT_FOUND') end
put(SHARD, shard, {quarantine_until_us = now, data_lost_us = 0, writes_lost_us = 0})
audit('QUARANTINE_ENDED', '', {reason = ARGV[7], user = ARGV[8]}, true)
announce()
return reply('OK', redis.call('HGETALL', SHARD))
