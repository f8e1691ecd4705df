-- Forbids the renewal of a lease, which lives on until its holder confirms or
-- its last acknowledged expiry passes.
-- ARGV 5.. token id, lease id, why
local id, lease_id = ARGV[5], ARGV[6]
local token, lease, record = owned_lease(id, lease_id)
if not token then return lease end
if not lease then return reply('LEASE_OVER', record.state, record.break_reason or '') end
if lease.state == 'OFFERED' then
  withdraw_offer(id, token, lease, false)
  mirror(id, token, nil)
  wake_next(id)
else
  break_lease(id, token, lease, ARGV[7])
end
return reply('OK', flat_lease(id, lease_id))
