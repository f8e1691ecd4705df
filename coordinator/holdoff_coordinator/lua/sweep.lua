-- Settles the tokens whose time has come, reservations, and all back-offs.
-- ARGV 7   how many tokens to settle at most
for _, id in ipairs(redis.call('ZRANGEBYSCORE', DUE, '-inf', us(now), 'LIMIT', 0, ARGV[7])) do
  if not settle(id) then redis.call('ZREM', DUE, id) end
end
expire_reservations()
back_offs()
return reply('OK')
