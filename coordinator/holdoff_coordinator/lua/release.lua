-- Ends a lease for its holder; a second time gives the same answer.
-- ARGV 7.. token id, lease id, hash of the secret, '1' if the holder saw every
--         refresh, age of the last refresh in µs ('' if not told), '1' if nothing
--         ran under the lease
local id, lease_id = ARGV[7], ARGV[8]
local token, lease, record = owned_lease(id, lease_id, ARGV[9])
if not token then return lease end
if not lease then
  if record.released ~= '1' then return reply('LEASE_OVER', record.state, record.break_reason or '') end
  return reply('OK', flat_lease(id, lease_id))
end
put(lease_key(id, lease_id), lease, {released = '1'})

if lease.state == 'OFFERED' then
  redis.call('ZREM', queue_key(id), lease.request)
  withdraw_offer(id, token, lease, false)
else
  local refreshed = now
  if not lease.break_reason then
    local reported = ARGV[11] ~= '' and now - number(ARGV[11]) or 0
    local started = number(lease.started_us)
    local life = math.min(number(lease.access_token_life_us), number(token.access_token_life_us))
    if ARGV[12] == '1' then
      refreshed = nil
    elseif ARGV[10] == '1' and reported >= number(lease.accepted_us) then
      refreshed = math.min(reported, now)
    elseif lease.refresh_at == 'START' and token.refresh_at == 'START'
        and started > 0 and now - started < life then
      refreshed = started
    end
  end
  if token.custody_us then refreshed = nil end -- its holder does not refresh
  finish(id, token, lease, lease.break_reason and 'BROKEN' or 'RELEASED', now, refreshed)
end
mirror(id, token, nil)
wake_next(id)
return reply('OK', flat_lease(id, lease_id))
