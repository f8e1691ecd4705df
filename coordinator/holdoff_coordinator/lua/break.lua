-- Forbids the renewal of a lease, which lives on until its holder confirms or
-- its last acknowledged expiry passes.
-- ARGV 7.. token id, lease id, why, who
local id, lease_id = ARGV[7], ARGV[8]
local token, lease, record = owned_lease(id, lease_id)
if not token then return lease end
if not lease then return reply('LEASE_OVER', record.state, record.break_reason or '') end
if lease.state == 'OFFERED' then
  audit_break(id, lease_id, ARGV[9], ARGV[10])
  withdraw_offer(id, token, lease, false)
  mirror(id, token, nil)
  wake_next(id)
else
  break_lease(id, token, lease, ARGV[9], ARGV[10])
end
return reply('OK', flat_lease(id, lease_id))
