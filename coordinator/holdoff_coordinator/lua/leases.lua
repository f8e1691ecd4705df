-- Stands between backoffs.lua and the other scripts: the queue of a token, and the
-- life of a lease.

local PLACE_KEPT_FOR = 60 * SECOND -- and keeps its place this long
local OFFER_FOR = 3 * SECOND
local LOOK_AGAIN = 1 * SECOND -- at every busy token, at the latest
local QUEUE_LIMIT = 1000 -- places a token; a walk of them takes some ms
local LAPSES_ALLOWED = 3 -- offers a waiter may miss before it goes to the end
local RECORD_KEPT_MS = 3600 * 1000 -- ended requests, and offers nobody accepted
local HOLDS_KEPT = 100 -- ended leases a token
local CHANGES_KEPT = 10000 -- of an app, for those who watch; some 5 MB
local WAITER_KEPT_MS = 7 * 24 * 3600 * 1000 -- places, through long outages
local SIGNAL_KEPT_MS = 1000 -- python-redis-lock's own default
local COOLDOWN_LOCK = 'holdoff-cooldown' -- the lock's value while cooling

-- Whether the time after the last refresh has not passed; without an interval there is none, not
-- even that by which the clocks differ.
local function cools(token)
  return sure < number(token.not_before_us) and number(token.not_before_us) > number(token.last_refresh_us)
end

-- Leases on a token in custody do not exclude each other. They are in an index of their own, by when they
-- expire, and never in `token.lease`, except for as long as a script deals with one of them. They tell
-- nothing of refreshes, so that their end begins no cooldown.
local shared = {LOCK = 'holdoff-custody'} -- the lock's value while the token is in custody
function shared.key(id) return SHARD .. ':shared:' .. id end

-- Notes in a token that was loaded how many shared leases live.
function shared.count(id, token)
  token.running = token.custody_us and redis.call('ZCARD', shared.key(id))
end

-- Of the back-offs that a job is subject to, those that hold one with this token: in custody the
-- coordinator requests access tokens, so that back-offs of these requests hold no job.
function shared.holding(id, subject)
  if not shared[id] then return subject end
  local holding = {}
  for _, one in ipairs(subject) do
    if one.kind ~= 'TOKEN_REQUEST' then holding[#holding + 1] = one end
  end
  return holding
end

-- What stands between a token in custody and its next shared lease, apart from the queue.
function shared.obstacle(token)
  local was_in_custody = number(token.custody_us) < number(shard.quarantine_since_us)
  if clock_in_doubt or (in_quarantine() and not was_in_custody) then return 'QUARANTINED' end
  return token.most_runs and token.running >= number(token.most_runs) and 'FULL' or ''
end

-- What stands between a token and its next lease, apart from the queue.
local function obstacle(token, lease)
  if token.custody_us then return shared.obstacle(token) end
  if in_quarantine() then return 'QUARANTINED' end
  if token.foreign or lease then return 'HELD' end
  if cools(token) then return 'COOLING' end
  return ''
end

-- The same for those who look at a token: what belongs to the app or to the whole
-- token makes all of its calls quiet.
local function shown_obstacle(id, token, lease)
  local reason = obstacle(token, lease)
  local subject = shared.holding(id, subject_to(id, {{'', ''}}))
  if reason == '' and wait_of('', subject, false) then return 'BACKING_OFF' end
  return reason
end

-- The back-offs that the holder of a lease is subject to, and the places that it named. Who
-- runs has refreshed already, so that those of token requests are not among them.
local function back_offs_of_holder(id, lease_id, lease)
  local request, subject = load(request_key(lease.request)), {}
  local places = places_of(id, request.places, request.job)
  for _, place in ipairs(touched(id, lease_id)) do places[#places + 1] = place end
  for _, one in ipairs(subject_to(id, places)) do
    if one.kind ~= 'TOKEN_REQUEST' then subject[#subject + 1] = one end
  end
  return subject, request.places
end

-- A lease for those who look at it: its record, and what its holder has to wait for.
local function shown_lease(id, lease_id, lease)
  local shown = flat(lease)
  if lease.state == 'ACTIVE' and next(back_offs()) then
    local wait = wait_of(lease.request, (back_offs_of_holder(id, lease_id, lease)), false)
    for _, value in ipairs(wait and {'back_off', cjson.encode(wait.back_off), 'go_on_us', us(wait.start)} or {}) do
      shown[#shown + 1] = value
    end
  end
  return shown
end

-- Tells those who watch what happened, and how the token stands now; `lease` is
-- the live one, or the one that just ended. Changes are numbered without a gap,
-- so that a reader knows whether it missed one.
local function tell(kind, id, token, lease_id, lease)
  shared.count(id, token)
  local change = us(redis.call('HINCRBY', SHARD, 'changes', 1))
  local entry = {
    'MAXLEN', '~', CHANGES_KEPT, change .. '-0',
    'kind', kind, 'token', id, 'at_us', us(now),
    'reason', shown_obstacle(id, token, token.lease and lease),
    'not_before_us', token.not_before_us or '0',
    'queue_length', us(redis.call('ZCARD', queue_key(id))),
    'lease', lease_id or '', 'shared', us(token.running or 0),
  }
  local shown = lease and shown_lease(id, lease_id, lease) or {}
  for i = 1, #shown, 2 do
    if shown[i] ~= 'secret_hash' and shown[i] ~= 'request' then
      entry[#entry + 1] = 'lease.' .. shown[i]
      entry[#entry + 1] = shown[i + 1]
    end
  end
  append(SHARD .. ':changes', unpack(entry))
end

local function tell_queue_moved(id)
  local token = load(token_key(id))
  tell('QUEUE_MOVED', id, token, token.lease, token.lease and load(lease_key(id, token.lease)))
end

-- Queue ---------------------------------------------------------------------

-- What a walk of a queue reads of each request: some 1000 of them may wait.
local WALK_FIELDS = {'state', 'heard_service_us', 'heard_us', 'token', 'places', 'job'}
local WALK_STEP = 50

-- A request in a queue, with whether it is live; nil if its place is not kept, or it is damaged.
local function kept_request(hash)
  local found = redis.pcall('HMGET', request_key(hash), unpack(WALK_FIELDS))
  local heard_service, heard = tonumber(found[2] or '0'), tonumber(found[3] or '0')
  if found.err or not heard or not heard_service then
    return spare('requests/' .. hash, error, found.err and found or 'it has no time')
  end
  if not found[1] or number(shard.service_us) - heard_service > PLACE_KEPT_FOR then return end
  return {
    state = found[1], token = found[4] or nil, places = found[5] or nil, job = found[6] or nil,
    live = is_live(now - heard),
  }
end

-- Walks the places that are kept, in order, dropping those that are not;
-- `visit(hash, request, live)` ends the walk by returning true.
local function walk_queue(id, visit)
  local key, at, dropped, done = queue_key(id), 0, false, false
  repeat
    local hashes = redis.call('ZRANGE', key, at, at + WALK_STEP - 1)
    at = at + #hashes
    for _, hash in ipairs(hashes) do
      local request = kept_request(hash)
      if not request then
        redis.call('ZREM', key, hash)
        redis.call('DEL', request_key(hash))
        dropped, at = true, at - 1
      elseif visit(hash, request, request.live) then
        done = true
        break
      end
    end
  until done or #hashes < WALK_STEP
  if dropped then tell_queue_moved(id) end
end

local function back_offs_of(request)
  local subject = subject_to(request.token, places_of(request.token, request.places, request.job))
  return shared.holding(request.token, subject)
end

-- The queue of a token at this instant: its length, and by request hash the
-- place, how many go before it, whether nobody live does, whether somebody silent
-- does, and what it must be quiet for. One who must be quiet is passed over. `free`
-- says whether the token could be given away now: only then does the first who must
-- be quiet for a back-off ask for its turn there.
local NOTHING = {}
local function queue_of(id, free, is_shared)
  local queue = {length = 0, ahead = 0, first = true, ahead_returning = false}
  local asked, all_go = {}, not next(back_offs())
  walk_queue(id, function(hash, request, live)
    queue.length = queue.length + 1
    local subject = all_go and NOTHING or back_offs_of(request)
    local asks = free and live and queue.first
    for _, one in ipairs(subject) do
      asks = asks and not asked[one.id]
    end
    local wait = #subject > 0 and wait_of(hash, subject, asks) or nil
    for _, one in ipairs(subject) do
      asked[one.id] = asked[one.id] or (live and in_the_way(wait, one))
    end
    queue[hash] = {
      place = queue.length, ahead = queue.ahead, first = queue.first,
      ahead_returning = queue.ahead_returning, wait = wait,
    }
    -- A waiter that has an offer of a shared lease does not delay those behind it.
    if not wait and not (is_shared and request.state == 'offered') then
      queue.ahead = queue.ahead + 1
      if live then queue.first = false else queue.ahead_returning = true end
    end
  end)
  return queue
end

-- The first live waiter that need not be quiet.
local function next_waiter(id)
  local first
  walk_queue(id, function(hash, request, live)
    local waits = live and request.state ~= 'offered'
    if waits and not wait_of(hash, back_offs_of(request), false) then first = hash end
    return first
  end)
  return first
end

-- `fingerprints` are lines: the one that is written now, then those that earlier releases
-- wrote for the same request.
local function is_same_request(request, fingerprints)
  local known = request.fingerprint
  return known and ('\n' .. fingerprints .. '\n'):find('\n' .. known .. '\n', 1, true)
end

local function hear(hash, request, age)
  put(request_key(hash), request, {
    heard_us = math.max(math.min(number(request.heard_us), now), now - age),
    heard_service_us = math.max(number(request.heard_service_us), number(shard.service_us) - age),
  })
  redis.call('PEXPIRE', request_key(hash), WAITER_KEPT_MS)
  redis.call('PEXPIRE', queue_key(request.token), WAITER_KEPT_MS)
end

local function wake_next(id)
  local hash = next_waiter(id)
  if hash then redis.call('SPUBLISH', SHARD .. ':wake', hash) end
end

-- Lease ---------------------------------------------------------------------

local ENDED_AS = {RELEASED = 'LEASE_RELEASED', EXPIRED = 'LEASE_LOST', BROKEN = 'LEASE_BROKEN'}

local function token_name(id) return '/tokens/' .. id end
local function lease_name(id, lease_id) return token_name(id) .. '/leases/' .. lease_id end

-- `refreshed` is the last instant at which the token may have been refreshed.
local function cool_down(id, token, refreshed, interval)
  put(token_key(id), token, {
    last_refresh_us = math.max(number(token.last_refresh_us), refreshed),
    not_before_us = math.max(number(token.not_before_us), refreshed + interval),
  })
  if cools(token) then put(token_key(id), token, {cooling = '1'}) end
  note_hold(interval)
end

local function forget_lease(id, token)
  if redis.call('ZREM', shared.key(id), token.lease) == 0 then redis.call('HDEL', token_key(id), 'lease') end
  shared.count(id, token)
  token.lease = nil
end

-- Ends a lease that was accepted, and keeps it in the token's history. Without `refreshed` no
-- cooldown begins.
local function finish(id, token, lease, state, ended, refreshed)
  caller_ended(lease.request, state == 'RELEASED') -- while its probe is still one
  local lease_id = token.lease
  if refreshed then
    cool_down(id, token, refreshed, math.max(number(lease.interval_us), number(token.interval_us)))
  end
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
  audit(ENDED_AS[state], lease_name(id, lease_id), {
    holder = lease.holder, reason = lease.break_reason or (state == 'EXPIRED' and 'it was not renewed in time'),
  }, state == 'RELEASED')
end

-- Takes back an offer that was not accepted: no cooldown, and the waiter keeps
-- its place, but is silent until it is heard again. One whose offers lapsed
-- again and again goes to the end.
local function withdraw_offer(id, token, lease, lapsed)
  caller_ended(lease.request, false)
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

-- Whether less than half of the TTL is left: a holder renews after a third of it.
local function renewal_late(lease)
  return lease.state == 'ACTIVE' and number(lease.expires_us) - now < number(lease.ttl_us) / 2
end

local function audit_break(id, lease_id, why, user)
  audit('LEASE_BREAK_ORDERED', lease_name(id, lease_id), {reason = why, user = user}, user)
end

-- `user` is the operator who wished it; nil for what followed by itself.
local function break_lease(id, token, lease, why, user)
  if not lease.break_reason then
    put(lease_key(id, token.lease), lease, {break_reason = why})
    tell('BREAKING', id, token, token.lease, lease)
    audit_break(id, token.lease, why, user)
    announce()
  end
end

-- Makes python-redis-lock's key say what our record says, pushes its signal
-- when the lock is free and no waiter of ours is next, and notes when this
-- token has to be looked at again: as long as anything about it is not idle.
local function mirror(id, token, lease)
  local value, until_us, look_us
  if token.foreign then
    look_us = now + SECOND
  elseif token.custody_us then
    -- Nobody else may refresh. It does not expire.
    if redis.call('GET', lock_key(id)) ~= shared.LOCK then
      redis.call('SET', lock_key(id), shared.LOCK)
      put(token_key(id), token, {mirror = shared.LOCK, mirror_until_us = 0})
    end
    local first_end = redis.call('ZRANGE', shared.key(id), 0, 0, 'WITHSCORES')[2]
    look_us = first_end and number(first_end)
  elseif lease and token.lease then
    value, until_us = token.lease, number(lease.expires_us)
    look_us = until_us
    if lease.state == 'ACTIVE' then
      -- Should it expire unseen, the lock must outlast the cooldown that follows.
      until_us = until_us + math.max(number(lease.interval_us), number(token.interval_us))
    end
  elseif cools(token) then
    value, until_us = COOLDOWN_LOCK, number(token.not_before_us)
    look_us = until_us
  end

  if value then
    if redis.call('GET', lock_key(id)) ~= value or number(token.mirror_until_us) ~= until_us then
      redis.call('SET', lock_key(id), value, 'PX', us(math.ceil((until_us - sure) / 1000)))
      put(token_key(id), token, {mirror = value, mirror_until_us = until_us})
    end
  elseif token.mirror and not token.foreign and not token.custody_us then
    redis.call('DEL', lock_key(id))
    if next_waiter(id) then
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
    next_waiter(id) -- drops the places that are not kept any more
    look_us = now + SECOND
  end
  if look_us then
    redis.call('ZADD', DUE, us(math.min(look_us + lag, now + LOOK_AGAIN)), id)
  else
    redis.call('ZREM', DUE, id)
  end
end

-- A refresh, a renewal or the beginning of a hold was never later than now: the clock of the store went back
-- since.
local function stay_in_the_past(id, token, lease)
  local last, held = number(token.last_refresh_us), number(token.hold_us)
  local ahead = math.max(last, held) - now
  if ahead > 0 then
    put(token_key(id), token, {
      last_refresh_us = math.min(last, now), hold_us = math.min(held, now),
      not_before_us = number(token.not_before_us) - ahead,
    })
  end
  local span = lease and (lease.state == 'OFFERED' and OFFER_FOR or number(lease.ttl_us))
  if lease and number(lease.expires_us) > now + span then
    put(lease_key(id, token.lease), lease, {expires_us = now + span})
  end
end

-- Ends the shared leases of a token that have run out; returns whether there were any.
function shared.settle(id, token)
  shared[id] = true
  if shard.went_back_us ~= token.went_back_us then
    -- The clock of the store went back: none was renewed later than now.
    for _, lease_id in ipairs(redis.call('ZRANGE', shared.key(id), 0, -1)) do
      local lease = load(lease_key(id, lease_id))
      local latest = now + (lease.state == 'OFFERED' and OFFER_FOR or number(lease.ttl_us))
      if lease.state and number(lease.expires_us) > latest then
        put(lease_key(id, lease_id), lease, {expires_us = latest})
        redis.call('ZADD', shared.key(id), us(latest), lease_id)
      end
    end
    put(token_key(id), token, {went_back_us = shard.went_back_us})
  end
  local ended = redis.call('ZRANGEBYSCORE', shared.key(id), '-inf', us(sure))
  for _, lease_id in ipairs(ended) do
    local lease = load(lease_key(id, lease_id))
    token.lease = lease_id
    if not lease.state then
      forget_lease(id, token)
    elseif lease.state == 'OFFERED' then
      withdraw_offer(id, token, lease, true)
    else
      finish(id, token, lease, lease.break_reason and 'BROKEN' or 'EXPIRED', number(lease.expires_us))
    end
  end
  shared.count(id, token)
  return #ended > 0
end

-- Brings a token up to this instant: ends what has run out, sees foreign locks, and
-- tells of a late renewal, unless it is the holder that is here. Returns the token and
-- its live lease, or nothing if there is no such token.
local function settle(id, by_holder)
  local token = load(token_key(id))
  if not token.policy then return end
  local lease = token.lease and load(lease_key(id, token.lease))
  local before = token.lease
  stay_in_the_past(id, token, lease)
  if token.custody_us and shared.settle(id, token) then before = 'shared' end
  if lease and sure >= number(lease.expires_us) then
    if lease.state == 'OFFERED' then
      withdraw_offer(id, token, lease, true)
    else
      local expired = number(lease.expires_us)
      finish(id, token, lease, lease.break_reason and 'BROKEN' or 'EXPIRED', expired, expired)
    end
  end
  if token.cooling and not cools(token) then
    redis.call('HDEL', token_key(id), 'cooling')
    token.cooling = nil
    tell('COOLING_ENDED', id, token, token.lease, token.lease and lease)
  end
  local owner = redis.call('GET', lock_key(id))
  local foreign = owner and owner ~= COOLDOWN_LOCK and owner ~= token.mirror and owner ~= before
  if foreign then
    local seen = token.foreign
    put(token_key(id), token, {foreign = owner})
    note_hold(number(token.interval_us)) -- it may refresh until it is seen no more
    if token.lease and lease.state == 'OFFERED' then
      withdraw_offer(id, token, lease)
    elseif token.lease then
      break_lease(id, token, lease, 'its lock was taken by a python-redis-lock user')
    end
    if not seen then
      tell('LOCK_TAKEN', id, token, token.lease, token.lease and lease)
      audit('LOCK_TAKEN', token_name(id), {reason = 'by a python-redis-lock user'})
    end
  elseif token.foreign then
    -- It ended some time before this look: count the latest possible instant.
    redis.call('HDEL', token_key(id), 'foreign')
    token.foreign = nil
    cool_down(id, token, now, number(token.interval_us))
    tell('LOCK_FREED', id, token, token.lease, token.lease and lease)
    audit('LOCK_FREED', token_name(id), {})
    before = before or 'foreign'
  end
  if not token.lease then lease = nil end
  if lease and not by_holder and lease.late ~= '1' and not lease.break_reason and renewal_late(lease) then
    put(lease_key(id, token.lease), lease, {late = '1'})
    tell('HOLDER_CHANGED', id, token, token.lease, lease)
  end
  mirror(id, token, lease)
  if before and before ~= token.lease then wake_next(id) end
  return token, lease
end

-- What a request waits for: {reason, place, queue length, earliest start in µs, 1 if
-- it may have the lease then without being told, the back-off in its way or ''}. The
-- reason is '' when it may have the lease at this instant. A request without a place,
-- for which `wait` says what it must be quiet for, comes after all others.
local function standing(id, token, lease, queue, hash, wait)
  local spot = queue[hash] or {
    place = 0, ahead = queue.ahead, first = queue.first, ahead_returning = queue.ahead_returning, wait = wait,
  }
  local first = spot.first
  local ahead_returning = spot.ahead_returning and now < number(shard.recovery_until_us)

  local interval = number(token.interval_us)
  local reason, start = obstacle(token, lease), math.max(number(token.not_before_us), now)
  if token.custody_us then interval, start = 0, now end
  if reason == 'FULL' then
    start = math.max(now, number(redis.call('ZRANGE', shared.key(id), 0, 0, 'WITHSCORES')[2]))
  end
  if reason == 'COOLING' then start = over_at(number(token.not_before_us)) end
  if reason == 'QUARANTINED' then
    start = math.max(start, quarantined_until())
  elseif token.foreign and not token.custody_us then
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
  if spot.place > 0 then start = start + spot.ahead * interval end
  if spot.wait then
    local ends_last = reason == 'COOLING' and spot.wait.start > start
    if reason == '' or reason == 'QUEUED' or ends_last then
      reason, first = 'BACKING_OFF', spot.wait.timed
    end
    start = math.max(start, spot.wait.start)
  end
  local shown = spot.wait and shown_back_off(spot.wait.back_off) or {}
  return {reason, us(spot.place), us(queue.length), us(start), first and '1' or '0', shown}
end

local function flat_lease(id, lease_id) return shown_lease(id, lease_id, load(lease_key(id, lease_id))) end

-- The lease a holder speaks of, after the token was settled: id, token, live
-- lease or nil, record. Returns an error reply as its second value.
local function owned_lease(id, lease_id, secret_hash)
  local token, live = settle(id, secret_hash)
  if not token then return nil, reply('TOKEN_NOT_FOUND') end
  if token.custody_us and redis.call('ZSCORE', shared.key(id), lease_id) then
    token.lease, live = lease_id, load(lease_key(id, lease_id))
  end
  if token.lease ~= lease_id then live = nil end
  local record = live or load(lease_key(id, lease_id))
  if not record.state then return nil, reply('LEASE_NOT_FOUND') end
  if secret_hash and record.secret_hash ~= secret_hash then return nil, reply('WRONG_SECRET') end
  return token, live, record
end
