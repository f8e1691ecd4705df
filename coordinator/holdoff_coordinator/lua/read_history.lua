-- Reads the latest leases of a token, the newest first.
-- ARGV 7   token id
-- Answers one {lease id, lease} a lease; offers are not among them.
local id = ARGV[7]
local token, live = settle(id)
if not token then return reply('TOKEN_NOT_FOUND') end
local ids = redis.call('LRANGE', history_key(id), 0, -1)
if live and live.state == 'ACTIVE' then table.insert(ids, 1, token.lease) end
for _, lease_id in ipairs(token.custody_us and redis.call('ZRANGE', shared.key(id), 0, -1) or {}) do
  if redis.call('HGET', lease_key(id, lease_id), 'state') == 'ACTIVE' then ids[#ids + 1] = lease_id end
end
if token.custody_us then table.sort(ids, function(one, other) return number(one) > number(other) end) end
local found = {}
for _, lease_id in ipairs(ids) do
  found[#found + 1] = {lease_id, spare(lease_name(id, lease_id):sub(2), flat_lease, id, lease_id) or {}}
end
return reply('OK', found)
