-- Reads tokens as they are at this instant.
-- ARGV 7.. token ids
-- Answers one {token id, token, lease id or '', lease, queue length, reason, earliest
-- start} a token that exists, then the number of the app's latest change.
local found = {}
for i = 7, #ARGV do
  local id = ARGV[i]
  local token, lease = settle(id)
  if token then
    local wait = wait_of('', subject_to(id, {{'', ''}}), false)
    local stand = standing(token, lease, queue_of(id, false), '', wait)
    found[#found + 1] = {
      id, redis.call('HGETALL', token_key(id)), token.lease or '',
      token.lease and flat_lease(id, token.lease) or {}, stand[3], stand[1], stand[4],
    }
  end
end
return reply('OK', found, redis.call('HGET', SHARD, 'changes') or '0')
