-- Reads the shared leases of a token, by when they expire.
-- ARGV 7   token id
-- Answers one {lease id, lease} a lease.
local id = ARGV[7]
local token = settle(id)
local found = {}
for _, lease_id in ipairs(token and token.custody_us and redis.call('ZRANGE', shared.key(id), 0, -1) or {}) do
  local lease = spare(lease_name(id, lease_id):sub(2), flat_lease, id, lease_id)
  if lease then found[#found + 1] = {lease_id, lease} end
end
return reply('OK', found)
