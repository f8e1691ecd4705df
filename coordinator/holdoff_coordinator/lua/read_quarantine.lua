-- Reads the shard, with all that is known of its quarantine.
return reply('OK', redis.call('HGETALL', SHARD))
