-- Stands before every other script. Loads the shard (all keys of one app),
-- watches the clock and the epoch, and holds the life of a lease.
--
-- KEYS[1]  holdoff:{app}, the shard; every other key starts with it or carries
--          the same hash tag, so that a script stays in one slot
-- ARGV[1]  the replica's estimate of the store's time, in µs; '' if it has none
-- ARGV[2]  the shard's epoch as the replica knows it; '' if it knows none
-- ARGV[3]  a fresh id, the epoch to give to a shard that has none
-- ARGV[4]  least length of a quarantine in µs
--
-- All times are µs of this server's clock; below 2^53 they are exact in Lua.

local SECOND = 1000000
local CLOCK_TOLERANCE = 1 * SECOND -- design, issue: a second in either direction
local LIVE_FOR = 5 * SECOND -- a waiter is live this long after it was heard
local PLACE_KEPT_FOR = 60 * SECOND -- and keeps its place this long
local OUTAGE_AFTER = 2 * SECOND -- replicas come by every second
local RECOVERY = 5 * SECOND -- after an outage waiters may return first
local OFFER_FOR = 3 * SECOND
local LOOK_AGAIN = 1 * SECOND -- at every busy token, at the latest
local QUEUE_LIMIT = 1000 -- places a token; a walk of them takes some ms
local LAPSES_ALLOWED = 3 -- offers a waiter may miss before it goes to the end
local RECORD_KEPT_MS = 3600 * 1000 -- ended requests, and offers nobody accepted
local HOLDS_KEPT = 100 -- ended leases a token
local CHANGES_KEPT = 10000 -- of an app, for those who watch; some 5 MB
local WAITER_KEPT_MS = 7 * 24 * 3600 * 1000 -- places, through long outages
local SIGNAL_KEPT_MS = 1000 -- python-redis-lock's own default
local SCHEMA = 2 -- of all records; `upgrade` below knows the older ones
local COOLDOWN_LOCK = 'holdoff-cooldown' -- the lock's value while cooling

local SHARD = KEYS[1]
local DUE = SHARD .. ':due'
local time = redis.call('TIME')
local now = tonumber(time[1]) * SECOND + tonumber(time[2])

local function us(number) return string.format('%.0f', number) end

local function number(text) return tonumber(text or '0') end

local function load(key)
  local flat = redis.call('HGETALL', key)
  local record = {}
  for i = 1, #flat, 2 do record[flat[i]] = flat[i + 1] end
  return record
end

local function token_key(id) return SHARD .. ':token:' .. id end
local function queue_key(id) return SHARD .. ':queue:' .. id end
local function history_key(id) return SHARD .. ':history:' .. id end
local function lock_key(id) return 'lock:' .. SHARD .. ':' .. id end
local function signal_key(id) return 'lock-signal:' .. SHARD .. ':' .. id end
local function request_key(hash) return SHARD .. ':request:' .. hash end
local function lease_key(id, lease) return SHARD .. ':lease:' .. id .. ':' .. lease end

local shard = load(SHARD)
local epoch = shard.epoch

-- How long after its last renewal a holder's last refresh may still matter.
local function longest_hold() return number(shard.longest_ttl_us) + number(shard.longest_interval_us) end

local function reply(status, ...) return {us(now), epoch or '', us(longest_hold()), status, ...} end

local function put(key, record, changes)
  local flat = {}
  for field, value in pairs(changes) do
    value = type(value) == 'number' and us(value) or value
    record[field] = value
    flat[#flat + 1] = field
    flat[#flat + 1] = value
  end
  redis.call('HSET', key, unpack(flat))
end

local function quarantine(why)
  local safe = math.max(number(ARGV[4]), longest_hold())
  put(SHARD, shard, {
    quarantine_until_us = math.max(number(shard.quarantine_until_us), now + safe),
    quarantine_reason = why,
  })
end

-- Called by the only script that makes a shard.
local function ensure_epoch()
  if epoch then return end
  epoch = ARGV[3]
  redis.call('DEL', SHARD .. ':changes')
  put(SHARD, shard, {epoch = epoch, schema = SCHEMA, changes = 0, tick_us = now, service_us = 0, high_water_us = now})
  if ARGV[2] ~= '' then quarantine('the store lost the data of this app') end
end

-- Schema 1 did not know who waits and since when, nor whether a cooldown's end
-- was told.
local function upgrade()
  for _, id in ipairs(redis.call('ZRANGE', SHARD .. ':tokens', 0, -1)) do
    local token = load(token_key(id))
    if number(token.not_before_us) > now then put(token_key(id), token, {cooling = '1'}) end
    for _, hash in ipairs(redis.call('ZRANGE', queue_key(id), 0, -1)) do
      local request = load(request_key(hash))
      if request.state then put(request_key(hash), request, {holder = '', queued_us = now}) end
    end
  end
  put(SHARD, shard, {schema = SCHEMA, changes = 0})
end

local found_schema = number(shard.schema or '1')
if epoch and found_schema > SCHEMA then
  return reply('SCHEMA_TOO_NEW', us(found_schema), us(SCHEMA))
elseif epoch and found_schema < SCHEMA then
  upgrade()
end

if epoch then
  if ARGV[2] ~= '' and ARGV[2] ~= epoch then quarantine('the epoch of the store changed') end
  if now < number(shard.high_water_us) - CLOCK_TOLERANCE then
    quarantine('the clock of the store went back')
  end
  -- `service_us` is a clock that stands still while no coordinator comes by.
  local gap = now - number(shard.tick_us)
  local changes = {tick_us = now, high_water_us = now}
  if gap > OUTAGE_AFTER then
    changes.recovery_until_us = now + RECOVERY
  elseif gap > 0 then
    changes.service_us = number(shard.service_us) + gap
  end
  put(SHARD, shard, changes)
end

-- A replica whose own clock disagrees gets no grant; it then measures, and
-- declares the quarantine if the disagreement is real.
local clock_in_doubt = ARGV[1] ~= '' and math.abs(now - tonumber(ARGV[1])) > CLOCK_TOLERANCE

local function quarantined_until()
  return math.max(number(shard.quarantine_until_us), clock_in_doubt and now + SECOND or 0)
end

-- What stands between a token and its next lease, apart from the queue.
local function obstacle(token, lease)
  if now < quarantined_until() then return 'QUARANTINED' end
  if token.foreign or lease then return 'HELD' end
  if now < number(token.not_before_us) then return 'COOLING' end
  return ''
end

-- Tells those who watch what happened, and how the token stands now; `lease` is
-- the live one, or the one that just ended. Changes are numbered without a gap,
-- so that a reader knows whether it missed one.
local function tell(kind, id, token, lease_id, lease)
  local key, change = SHARD .. ':changes', us(redis.call('HINCRBY', SHARD, 'changes', 1))
  local entry = {
    key, 'MAXLEN', '~', CHANGES_KEPT, change .. '-0',
    'kind', kind, 'token', id, 'at_us', us(now),
    'reason', obstacle(token, token.lease and lease),
    'not_before_us', token.not_before_us or '0',
    'queue_length', us(redis.call('ZCARD', queue_key(id))),
    'lease', lease_id or '',
  }
  for field, value in pairs(lease or {}) do
    if field ~= 'secret_hash' and field ~= 'request' then
      entry[#entry + 1] = 'lease.' .. field
      entry[#entry + 1] = value
    end
  end
  if redis.pcall('XADD', unpack(entry)).err then
    redis.call('DEL', key) -- it is not ours, or of another life of the store
    redis.call('XADD', unpack(entry))
  end
end

local function tell_queue_moved(id)
  local token = load(token_key(id))
  tell('QUEUE_MOVED', id, token, token.lease, token.lease and load(lease_key(id, token.lease)))
end

-- Queue ---------------------------------------------------------------------

-- Walks the places that are kept, in order, dropping those that are not;
-- `visit(hash, request, live)` ends the walk by returning true.
local function walk_queue(id, visit)
  local dropped = false
  for _, hash in ipairs(redis.call('ZRANGE', queue_key(id), 0, -1)) do
    local request = load(request_key(hash))
    if not request.state or number(shard.service_us) - number(request.heard_service_us) > PLACE_KEPT_FOR then
      redis.call('ZREM', queue_key(id), hash)
      redis.call('DEL', request_key(hash))
      dropped = true
    elseif visit(hash, request, now - number(request.heard_us) <= LIVE_FOR) then
      break
    end
  end
  if dropped then tell_queue_moved(id) end
end

-- The queue of a token at this instant: its length, and by request hash the
-- place, whether nobody live is ahead, and whether somebody silent is.
local function queue_of(id)
  local queue = {length = 0, first = true, ahead_returning = false}
  walk_queue(id, function(hash, _, live)
    queue.length = queue.length + 1
    queue[hash] = {
      place = queue.length, first = queue.first, ahead_returning = queue.ahead_returning,
    }
    if live then queue.first = false else queue.ahead_returning = true end
  end)
  return queue
end

local function first_live_waiter(id)
  local first
  walk_queue(id, function(hash, _, live)
    if live then first = hash end
    return live
  end)
  return first
end

local function hear(hash, request, age)
  put(request_key(hash), request, {
    heard_us = math.max(number(request.heard_us), now - age),
    heard_service_us = math.max(number(request.heard_service_us), number(shard.service_us) - age),
  })
  redis.call('PEXPIRE', request_key(hash), WAITER_KEPT_MS)
  redis.call('PEXPIRE', queue_key(request.token), WAITER_KEPT_MS)
end

local function wake_next(id)
  local hash = first_live_waiter(id)
  if hash then redis.call('PUBLISH', SHARD .. ':wake', hash) end
end

-- Lease ---------------------------------------------------------------------

-- `refreshed` is the last instant at which the token may have been refreshed.
local function cool_down(id, token, refreshed, interval)
  put(token_key(id), token, {
    last_refresh_us = math.max(number(token.last_refresh_us), refreshed),
    not_before_us = math.max(number(token.not_before_us), refreshed + interval),
  })
  if now < number(token.not_before_us) then put(token_key(id), token, {cooling = '1'}) end
end

local function forget_lease(id, token)
  redis.call('HDEL', token_key(id), 'lease')
  token.lease = nil
end

-- Ends a lease that was accepted, and keeps it in the token's history.
local function finish(id, token, lease, state, ended, refreshed)
  local lease_id = token.lease
  cool_down(id, token, refreshed, math.max(number(lease.interval_us), number(token.interval_us)))
  put(lease_key(id, lease_id), lease, {
    state = state, ended_us = ended, not_before_us = token.not_before_us,
  })
  if redis.call('LPUSH', history_key(id), lease_id) > HOLDS_KEPT then
    redis.call('DEL', lease_key(id, redis.call('RPOP', history_key(id))))
  end
  redis.call('HSET', request_key(lease.request), 'state', 'ended')
  redis.call('PEXPIRE', request_key(lease.request), RECORD_KEPT_MS)
  forget_lease(id, token)
  tell(state, id, token, lease_id, lease)
end

-- Takes back an offer that was not accepted: no cooldown, and the waiter keeps
-- its place, but is silent until it is heard again. One whose offers lapsed
-- again and again goes to the end.
local function withdraw_offer(id, token, lease, lapsed)
  local lease_id = token.lease
  put(lease_key(id, lease_id), lease, {state = 'WITHDRAWN', ended_us = now})
  redis.call('PEXPIRE', lease_key(id, lease_id), RECORD_KEPT_MS)
  local key = request_key(lease.request)
  if redis.call('ZSCORE', queue_key(id), lease.request) then
    redis.call('HDEL', key, 'lease')
    redis.call('HSET', key, 'state', 'waiting', 'heard_us', '0')
    if lapsed and redis.call('HINCRBY', key, 'lapses', 1) % LAPSES_ALLOWED == 0 then
      redis.call('ZADD', queue_key(id), redis.call('HINCRBY', SHARD, 'sequence', 1), lease.request)
    end
  else
    redis.call('DEL', key)
  end
  forget_lease(id, token)
  tell('WITHDRAWN', id, token, lease_id, lease)
end

local function break_lease(id, token, lease, why)
  if not lease.break_reason then
    put(lease_key(id, token.lease), lease, {break_reason = why})
    tell('BREAKING', id, token, token.lease, lease)
  end
end

-- Makes python-redis-lock's key say what our record says, pushes its signal
-- when the lock is free and no waiter of ours is next, and notes when this
-- token has to be looked at again: as long as anything about it is not idle.
local function mirror(id, token, lease)
  local value, until_us, look_us
  if token.foreign then
    look_us = now + SECOND
  elseif lease and token.lease then
    value, until_us = token.lease, number(lease.expires_us)
    look_us = until_us
    if lease.state == 'ACTIVE' then
      -- Should it expire unseen, the lock must outlast the cooldown that follows.
      until_us = until_us + math.max(number(lease.interval_us), number(token.interval_us))
    end
  elseif now < number(token.not_before_us) then
    value, until_us = COOLDOWN_LOCK, number(token.not_before_us)
    look_us = until_us
  end

  if value then
    if redis.call('GET', lock_key(id)) ~= value or number(token.mirror_until_us) ~= until_us then
      redis.call('SET', lock_key(id), value, 'PX', us(math.ceil((until_us - now) / 1000)))
      put(token_key(id), token, {mirror = value, mirror_until_us = until_us})
    end
  elseif token.mirror and not token.foreign then
    redis.call('DEL', lock_key(id))
    if first_live_waiter(id) then
      look_us = now + SECOND -- should that waiter not take it
    else
      redis.call('HDEL', token_key(id), 'mirror', 'mirror_until_us')
      token.mirror = nil
      redis.call('DEL', signal_key(id))
      redis.call('LPUSH', signal_key(id), 1)
      redis.call('PEXPIRE', signal_key(id), SIGNAL_KEPT_MS)
    end
  end

  if not look_us and redis.call('EXISTS', queue_key(id)) == 1 then
    first_live_waiter(id) -- drops the places that are not kept any more
    look_us = now + SECOND
  end
  if look_us then
    redis.call('ZADD', DUE, us(math.min(look_us, now + LOOK_AGAIN)), id)
  else
    redis.call('ZREM', DUE, id)
  end
end

-- Brings a token up to this instant: ends what has run out and sees foreign
-- locks. Returns the token and its live lease, or nothing if there is no such
-- token.
local function settle(id)
  local token = load(token_key(id))
  if not token.policy then return end
  local lease = token.lease and load(lease_key(id, token.lease))
  local before = token.lease
  if lease and now >= number(lease.expires_us) then
    if lease.state == 'OFFERED' then
      withdraw_offer(id, token, lease, true)
    else
      local expired = number(lease.expires_us)
      finish(id, token, lease, lease.break_reason and 'BROKEN' or 'EXPIRED', expired, expired)
    end
  end
  if token.cooling and now >= number(token.not_before_us) then
    redis.call('HDEL', token_key(id), 'cooling')
    token.cooling = nil
    tell('COOLING_ENDED', id, token, token.lease, token.lease and lease)
  end
  local owner = redis.call('GET', lock_key(id))
  local foreign = owner and owner ~= COOLDOWN_LOCK and owner ~= token.mirror and owner ~= before
  if foreign then
    local seen = token.foreign
    put(token_key(id), token, {foreign = owner})
    if token.lease and lease.state == 'OFFERED' then
      withdraw_offer(id, token, lease)
    elseif token.lease then
      break_lease(id, token, lease, 'its lock was taken by a python-redis-lock user')
    end
    if not seen then tell('LOCK_TAKEN', id, token, token.lease, token.lease and lease) end
  elseif token.foreign then
    -- It ended some time before this look: count the latest possible instant.
    redis.call('HDEL', token_key(id), 'foreign')
    token.foreign = nil
    cool_down(id, token, now, number(token.interval_us))
    tell('LOCK_FREED', id, token, token.lease, token.lease and lease)
    before = before or 'foreign'
  end
  if not token.lease then lease = nil end
  mirror(id, token, lease)
  if before and before ~= token.lease then wake_next(id) end
  return token, lease
end

-- What a request waits for: {reason, place, queue length, earliest start in µs
-- or '', 1 if it is the first live waiter}. The reason is '' when it may have
-- the lease at this instant. A request without a place comes after all others.
local function standing(token, lease, queue, hash)
  local spot = queue[hash] or {place = 0, first = queue.first, ahead_returning = queue.ahead_returning}
  local place, first = spot.place, spot.first
  local ahead_returning = spot.ahead_returning and now < number(shard.recovery_until_us)

  local interval = number(token.interval_us)
  local reason, start = obstacle(token, lease), math.max(number(token.not_before_us), now)
  if reason == 'QUARANTINED' then
    start = math.max(start, quarantined_until())
  elseif token.foreign then
    start = start + interval
  elseif lease and lease.state == 'ACTIVE' then
    local refreshed = now
    if lease.refresh_at == 'START' and token.refresh_at == 'START' and not lease.break_reason then
      refreshed = number(lease.started_us or lease.accepted_us)
    end
    start = math.max(start, refreshed + math.max(interval, number(lease.interval_us)))
  elseif reason == '' and (not first or ahead_returning) then
    reason = 'QUEUED'
    if ahead_returning then start = math.max(start, number(shard.recovery_until_us)) end
  end
  -- Everybody ahead refreshes too, each an interval apart.
  if place > 1 then start = start + (place - 1) * interval end
  return {reason, us(place), us(queue.length), us(start), first and '1' or '0'}
end

local function flat_lease(id, lease_id) return redis.call('HGETALL', lease_key(id, lease_id)) end

-- The lease a holder speaks of, after the token was settled: id, token, live
-- lease or nil, record. Returns an error reply as its second value.
local function owned_lease(id, lease_id, secret_hash)
  local token, live = settle(id)
  if not token then return nil, reply('TOKEN_NOT_FOUND') end
  if token.lease ~= lease_id then live = nil end
  local record = live or load(lease_key(id, lease_id))
  if not record.state then return nil, reply('LEASE_NOT_FOUND') end
  if secret_hash and record.secret_hash ~= secret_hash then return nil, reply('WRONG_SECRET') end
  return token, live, record
end
