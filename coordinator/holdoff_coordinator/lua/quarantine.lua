-- Holds back new grants of the shard: a replica saw the store's clock jump.
-- ARGV 7   why
if epoch then quarantine(ARGV[7]) end
return reply('OK', us(quarantined_until()))
