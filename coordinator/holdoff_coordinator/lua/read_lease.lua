-- Reads one lease, live or ended.
-- ARGV 5.. token id, lease id
local token, lease, record = owned_lease(ARGV[5], ARGV[6])
if not token then return lease end
return reply('OK', flat_lease(ARGV[5], ARGV[6]))
