-- Settles the tokens whose time has come, reservations, and all back-offs.
-- ARGV 7   how many tokens to settle at most
local DAMAGED_AFTER = 60 * SECOND -- a damaged token is looked at again, behind all others

local function sweep(id)
  if not settle(id) then redis.call('ZREM', DUE, id) end
  return true
end

-- What is due later than ever was due before the clock of the store went back.
for _, due in ipairs({{'-inf', us(now)}, {'(' .. us(now + DAMAGED_AFTER), '+inf'}}) do
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', DUE, due[1], due[2], 'LIMIT', 0, ARGV[7])) do
    if not spare('tokens/' .. id, sweep, id) then redis.call('ZADD', DUE, us(now + DAMAGED_AFTER), id) end
  end
end
expire_reservations()
back_offs()
return reply('OK')
