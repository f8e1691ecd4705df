-- Reads tokens as they are at this instant.
-- ARGV 7.. token ids
-- Answers one {token id, token, lease id or '', lease, queue length, reason, earliest
-- start, since when its first waiter waits or '0', how many shared leases live} a token that exists, then the number
-- of the app's latest change. A token that is damaged is left out.
local found = {}
local function read(id)
  local token, lease = settle(id)
  if token then
    local wait = wait_of('', shared.holding(id, subject_to(id, {{'', ''}})), false)
    local stand = standing(id, token, lease, queue_of(id, false, token.custody_us), '', wait)
    local head = redis.call('ZRANGE', queue_key(id), 0, 0)[1]
    found[#found + 1] = {
      id, redis.call('HGETALL', token_key(id)), token.lease or '',
      token.lease and flat_lease(id, token.lease) or {}, stand[3], stand[1], stand[4],
      head and redis.call('HGET', request_key(head), 'queued_us') or '0', us(token.running or 0),
    }
  end
end
for i = 7, #ARGV do spare('tokens/' .. ARGV[i], read, ARGV[i]) end
return reply('OK', found, redis.call('HGET', SHARD, 'changes') or '0')
