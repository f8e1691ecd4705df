-- Holds back new grants of the shard: a replica saw the store's clock jump.
-- ARGV 7.. why, what may be lost (see `quarantine`)
if epoch then quarantine(ARGV[7], ARGV[8]) end
return reply('OK', us(quarantined_until()))
