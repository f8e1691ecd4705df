-- Accepts an offer (the first renewal) or prolongs a lease. Goes on during a
-- quarantine, and puts the lock's key back if somebody deleted it.
-- ARGV 7.. token id, lease id, hash of the secret, '1' if the command has
--         started, age of the last refresh in µs ('' if not told), '1' if the
--         command is paused
local id, lease_id = ARGV[7], ARGV[8]
local token, lease, record = owned_lease(id, lease_id, ARGV[9])
if not token then return lease end
if not lease then return reply('LEASE_OVER', record.state, record.break_reason or '') end
if lease.break_reason then return reply('LEASE_BROKEN', lease.break_reason, lease.expires_us) end

local late, paused = renewal_late(lease), lease.paused or '0'
local changes = {expires_us = now + number(lease.ttl_us), late = '0', paused = ARGV[12]}
if lease.state == 'OFFERED' then
  changes.state, changes.accepted_us = 'ACTIVE', now
  changes.sequence = redis.call('ZSCORE', queue_key(id), lease.request) or '' -- see withhold.lua
  redis.call('ZREM', queue_key(id), lease.request)
  redis.call('HSET', request_key(lease.request), 'state', 'held')
end
if ARGV[10] == '1' and not lease.started_us then changes.started_us = now end
if ARGV[11] ~= '' then changes.reported_refresh_us = now - number(ARGV[11]) end
put(lease_key(id, lease_id), lease, changes)
if token.custody_us then
  redis.call('ZADD', shared.key(id), us(changes.expires_us), lease_id)
else
  note_hold(number(lease.ttl_us) + math.max(number(lease.interval_us), number(token.interval_us)))
end
if changes.accepted_us then
  tell('GRANTED', id, token, lease_id, lease)
  -- It was to be had since the last one had ended and cooled down, if somebody waited.
  local queued = number(lease.queued_us or lease.created_us)
  audit('LEASE_GRANTED', lease_name(id, lease_id), {
    holder = lease.holder, waited_us = now - queued,
    handover_us = now - math.max(queued, number(token.not_before_us)),
  }, true)
end
if late then tell('RENEWED_LATE', id, token, lease_id, lease) end
if paused ~= lease.paused then tell('HOLDER_CHANGED', id, token, lease_id, lease) end
-- The record outlives the lease by far, and no request outlives its record.
redis.call('PEXPIRE', request_key(lease.request), WAITER_KEPT_MS)
mirror(id, token, lease)
return reply('OK', flat_lease(id, lease_id))
