-- Reads one lease, live or ended.
-- ARGV 7.. token id, lease id
local token, lease, record = owned_lease(ARGV[7], ARGV[8])
if not token then return lease end
return reply('OK', flat_lease(ARGV[7], ARGV[8]))
