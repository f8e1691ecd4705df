-- Reads the latest leases of a token, the newest first.
-- ARGV 7   token id
-- Answers one {lease id, lease} a lease; offers are not among them.
local id = ARGV[7]
local token, live = settle(id)
if not token then return reply('TOKEN_NOT_FOUND') end
local ids = redis.call('LRANGE', history_key(id), 0, -1)
if live and live.state == 'ACTIVE' then table.insert(ids, 1, token.lease) end
local found = {}
for i, lease_id in ipairs(ids) do found[i] = {lease_id, flat_lease(id, lease_id)} end
return reply('OK', found)
