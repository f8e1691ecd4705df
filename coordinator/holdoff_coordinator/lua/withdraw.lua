-- Gives up a place, and an offer that was not accepted yet.
-- ARGV 7.. token id, request hash, fingerprints of caller and parameters
local id, hash = ARGV[7], ARGV[8]
local token, lease = settle(id)
if not token then return reply('TOKEN_NOT_FOUND') end
local request = load(request_key(hash))
if not is_same_request(request, ARGV[9]) then return reply('OK') end
if request.state == 'waiting' or request.state == 'offered' then
  redis.call('ZREM', queue_key(id), hash)
  if token.custody_us and request.lease then token, lease = owned_lease(id, request.lease) end
  if lease and lease.state == 'OFFERED' and lease.request == hash then
    withdraw_offer(id, token, lease, false)
    mirror(id, token, nil)
  end
  redis.call('DEL', request_key(hash))
  caller_ended(hash, false)
  if request.state == 'waiting' then tell_queue_moved(id) end
  wake_next(id)
end
return reply('OK')
