-- Takes back an acceptance of which the store has too few copies: no cooldown begins, and
-- the waiter keeps its position. A renewal since then is for its own caller to judge.
-- ARGV 7.. token id, lease id, hash of the secret, the expiry that the acceptance gave in µs
local id, lease_id = ARGV[7], ARGV[8]
local token, lease = owned_lease(id, lease_id, ARGV[9])
if not token then return lease end
if lease and lease.state == 'ACTIVE' and lease.expires_us == ARGV[10] then
  if lease.sequence ~= '' then redis.call('ZADD', queue_key(id), lease.sequence, lease.request) end
  withdraw_offer(id, token, lease, false)
  audit('LEASE_RELEASED', lease_name(id, lease_id), {
    holder = lease.holder, reason = 'too few replicas of the store had it: it was not granted',
  })
  mirror(id, token, nil)
  wake_next(id)
end
return reply('OK')
