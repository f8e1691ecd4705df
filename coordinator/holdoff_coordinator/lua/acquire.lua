-- Asks for a lease: gives the same one again, offers a new one to the first
-- live waiter, or says what the request waits for. Also the poll of a waiter.
-- ARGV 7.. token id, request hash, fingerprints of caller and parameters (see leases.lua),
--         '1' to queue or '0', TTL µs, holder, hash of the lease's secret,
--         time since the waiter was heard in µs, highest fencing token it knows,
--         places of its calls as JSON, hash of the job's name or '', how many bytes of
--         places all waiters of the token may declare, the mode that it must have or '', how
--         many shared leases may live at once
local id, hash, fingerprints = ARGV[7], ARGV[8], ARGV[9]
local may_queue, ttl, heard_age = ARGV[10] == '1', number(ARGV[11]), number(ARGV[14])

local token, lease = settle(id)
if not token then return reply('TOKEN_NOT_FOUND') end
local request = load(request_key(hash))
if request.fingerprint and not is_same_request(request, fingerprints) then
  return reply('REQUEST_ID_REUSED')
end
if request.state == 'ended' then return reply('LEASE_ENDED', request.lease) end
if request.lease then return reply('OFFER', request.lease, flat_lease(id, request.lease)) end
local refusal = ARGV[19] == 'EXCLUSIVE' and token.custody_us and 'IN_CUSTODY'
  or ARGV[19] == 'SHARED' and not token.custody_us and 'NOT_IN_CUSTODY'
if refusal then
  redis.call('ZREM', queue_key(id), hash)
  redis.call('DEL', request_key(hash))
  return reply(refusal)
end
if token.custody_us and token.most_runs ~= ARGV[20] then put(token_key(id), token, {most_runs = ARGV[20]}) end

local known = number(ARGV[15])
if known > math.max(number(token.fencing), now + 366 * 24 * 3600 * SECOND) then return reply('FENCING_TOKEN_TOO_LARGE') end

local facts = {
  fingerprint = fingerprints:match('[^\n]+'), token = id, state = 'waiting',
  holder = ARGV[12], queued_us = number(request.queued_us or us(now)),
  places = ARGV[16], job = ARGV[17],
}
local subject = back_offs_of(facts)
if may_queue and not request.state then
  if redis.call('ZCARD', queue_key(id)) >= QUEUE_LIMIT then return reply('QUEUE_FULL') end
  if ARGV[18] and #facts.places > 0 then -- each poll of the queue reads what all waiters declared
    local declared = #facts.places
    for _, other in ipairs(redis.call('ZRANGE', queue_key(id), 0, -1)) do
      declared = declared + redis.call('HSTRLEN', request_key(other), 'places')
    end
    if declared > number(ARGV[18]) then return reply('TOO_MANY_SCOPES') end
  end
  put(request_key(hash), request, facts)
  redis.call('ZADD', queue_key(id), redis.call('HINCRBY', SHARD, 'sequence', 1), hash)
  redis.call('ZADD', DUE, 'NX', us(now + SECOND), id)
  tell_queue_moved(id)
end
if request.state then hear(hash, request, heard_age) end

if known > number(token.fencing) then put(token_key(id), token, {fencing = known}) end
local queue = queue_of(id, obstacle(token, lease) == '', token.custody_us)
local stand = standing(id, token, lease, queue, hash, wait_of(hash, subject, false))
if stand[1] ~= '' or heard_age > LIVE_FOR then
  return reply('WAITING', stand, token.lease and flat_lease(id, token.lease) or {}, token.lease or '')
end

local fencing = math.max(number(token.fencing) + 1, now)
local lease_id = us(fencing)
facts.lease, facts.state = lease_id, 'offered'
put(request_key(hash), request, facts)
redis.call('PEXPIRE', request_key(hash), WAITER_KEPT_MS)
lease = {}
put(lease_key(id, lease_id), lease, {
  state = 'OFFERED', request = hash, secret_hash = ARGV[13], holder = ARGV[12],
  fencing = fencing, ttl_us = ttl, interval_us = token.interval_us, refresh_at = token.refresh_at,
  access_token_life_us = token.access_token_life_us, queued_us = facts.queued_us,
  created_us = now, expires_us = now + OFFER_FOR, mode = token.custody_us and 'SHARED' or 'EXCLUSIVE',
})
put(token_key(id), token, {fencing = fencing})
if token.custody_us then
  redis.call('ZADD', shared.key(id), us(now + OFFER_FOR), lease_id)
else
  put(token_key(id), token, {lease = lease_id})
end
go(hash, subject)
mirror(id, token, lease)
if token.custody_us then wake_next(id) end -- there may be room for more
return reply('OFFER', lease_id, flat_lease(id, lease_id))
