-- Stands before each script of custody: the grant record of a token, apart from its leases.
--
-- ARGV[7]  the request as MessagePack: a map with `token`, and what the script names
-- The answer is one MessagePack map with `status`, and what the script names. Instants are µs of
-- the store's clock.

local ask = cmsgpack.unpack(ARGV[7])
local id = ask.token
local GRANTS = SHARD .. ':grants' -- tokens in custody, by name
local IDLING = SHARD .. ':idling' -- tokens in custody, by when to refresh them if nothing uses them
local PRINTS = SHARD .. ':fingerprints' -- tokens in custody, by the fingerprint of the grant

local function grant_key(token_id) return SHARD .. ':grant:' .. token_id end

local NUMBERS = {
  'generation', 'created_us', 'since_us', 'refreshed_us', 'not_before_us', 'expires_us', 'idle_us', 'unproven',
  'first_unproven_us', 'not_sent', 'attempt_begun_us', 'confirmed_us', 'evidence_us',
}

-- The record of a grant. In a tombstone, which keeps what must not be forgotten, `sealed_grant` is ''.
-- If the clock went back, the last refresh is taken to be now.
local function load_grant(token_id)
  local grant = load(grant_key(token_id))
  if not grant.generation then return end
  for _, field in ipairs(NUMBERS) do grant[field] = number(grant[field]) end
  local ahead = grant.refreshed_us - now
  if ahead > 0 then
    grant.refreshed_us, grant.not_before_us = now, grant.not_before_us - ahead
  end
  for _, field in ipairs({'created_us', 'confirmed_us', 'evidence_us'}) do
    grant[field] = math.min(grant[field], now)
  end
  return grant
end

local function is_kept(grant) return grant and grant.sealed_grant ~= '' end

-- Whether a grant is the one that the caller means; any is, if it does not say.
local function is_meant(grant)
  return not ask.etag_chain or (grant.chain == ask.etag_chain and grant.generation == ask.etag_generation)
end

-- When to refresh a grant that nothing uses: at 80 % of the idle life of its refresh token. Nothing
-- if it has none, or only an operator can help.
local function idle_refresh_at(grant)
  local span = grant.idle_us - grant.refreshed_us
  if span <= 0 or grant.condition ~= 'READY' then return end
  return math.max(grant.refreshed_us + math.floor(span * 0.8), grant.not_before_us)
end

-- Writes fields of a grant.
local function keep_grant(grant, changes)
  put(grant_key(id), {}, changes)
  for field, value in pairs(changes) do grant[field] = value end
  if is_kept(grant) then redis.call('ZADD', GRANTS, 0, id) else redis.call('ZREM', GRANTS, id) end
  local idle_at = is_kept(grant) and idle_refresh_at(grant)
  if idle_at then redis.call('ZADD', IDLING, us(idle_at), id) else redis.call('ZREM', IDLING, id) end
end

-- When the right of a replica to a request that is under way ends; nothing if none is.
local function right_until(grant)
  if grant and (grant.attempt_step == 'BEGUN' or grant.attempt_step == 'INTENDED') then
    return grant.attempt_begun_us + ask.takeover_us
  end
end

-- The last instant at which the last request may have been answered, if its right has ended and
-- nothing is known of its result; 0 else.
local function lost_at(grant)
  return grant and grant.attempt_step == 'INTENDED' and right_until(grant) or 0
end

-- The quarantine: when it began, or the last loss in it was found, and the worst loss. '' if there is
-- none, or the clock is in doubt, since then no instant means anything.
local function this_quarantine()
  local since = number(shard.quarantine_since_us)
  if clock_in_doubt or since == 0 or sure >= number(shard.quarantine_until_us) then return '' end
  local began, loss = since, 'CLOCK'
  for _, one in ipairs({{'WRITES', shard.writes_lost_us}, {'CLOCK', shard.clock_doubted_us}, {'DATA', shard.data_lost_us}}) do
    if number(one[2]) >= since and number(one[2]) > 0 then
      began, loss = math.max(began, number(one[2])), one[1]
    end
  end
  return us(began) .. ' ' .. loss
end

-- Whether a grant may be that of a backup, so that its refresh token may have been used since. Newer
-- evidence is a put, an answer that was stored since, or the word of an operator.
local function may_be_restored(grant)
  return number(shard.restored_us) > math.max(grant.created_us, grant.evidence_us)
end

-- The same for a failover, after which it is evidence, too, that a replica presented the grant as the
-- newest that it knows.
local function may_be_behind(grant)
  return number(shard.writes_lost_us)
    > math.max(grant.created_us, grant.evidence_us, grant.refreshed_us, grant.confirmed_us)
end

-- An authorization by a person: `step` is PENDING until the code is about to be sent, then INTENDED, and
-- DONE when its grant is stored. It holds the token's cooldown until `until_us`, which `hold_chain` of the
-- token says; `not_before_us` is that without it. If the clock went back, it began now.
local function authorization_key(token_id) return SHARD .. ':authorization:' .. token_id end

local function load_authorization(token_id)
  local found = load(authorization_key(token_id))
  if not found.chain then return end
  local fields = {'valid_us', 'until_us', 'not_before_us', 'begun_us'}
  local ahead = math.max(0, number(found.begun_us) - now)
  for _, field in ipairs(fields) do found[field] = number(found[field]) - ahead end
  return found
end

local function holds(token, authorization)
  return authorization and authorization.step ~= 'DONE' and token.hold_chain == authorization.chain
end

-- Frees the cooldown of a token that was loaded from its authorization.
local function free_cooldown(token, authorization)
  if not holds(token, authorization) then return end
  token.not_before_us = us(math.max(
    authorization.not_before_us, number(token.last_refresh_us) + number(token.interval_us)
  ))
end

-- What prevents the next request for an access token, apart from the grant itself: a reason, and
-- until when; nothing if nothing does. The holder of a lease may refresh by itself.
local function held_by(token)
  if in_quarantine() and not (ask.quarantine and ask.quarantine ~= '' and ask.quarantine == this_quarantine()) then
    return 'QUARANTINED', quarantined_until()
  end
  if token.foreign then return 'LOCKED', now + SECOND end
  if cools(token) then
    return holds(token, load_authorization(id)) and 'AUTHORIZING' or 'COOLING', over_at(number(token.not_before_us))
  end
  -- One request an interval neither probes a back-off nor follows in turn: it goes when the pause is over.
  local pause = 0
  for _, one in ipairs(subject_to(id, {{'', ''}})) do
    if one.state == 'QUIET' then pause = math.max(pause, over_at(number(one.until_us))) end
  end
  if pause > 0 then return 'BACKING_OFF', pause end
end

-- Until when a budget of the request is spent; nothing if each has room for it.
local function spent_until()
  for _, spec in ipairs(ask.budgets) do
    local counted = counted_in(spec)
    local budget = load_budget(counted.id, counted)
    if room(budget) < 1 then return room_at(counted.id, budget, 1) end
  end
end

-- When the exchange of a code that is under way counts as lost; nothing if none is under way.
local function exchange_until(authorization)
  if not authorization or authorization.step ~= 'INTENDED' then return end
  local over = authorization.begun_us + ask.takeover_us
  return sure < over and over_at(over) or nil
end

-- Lets an authorization hold the cooldown of a token that was freed, and keeps changes of it.
local function hold_cooldown(token, lease, authorization, changes)
  changes.not_before_us = number(token.not_before_us)
  put(authorization_key(id), authorization, changes)
  put(token_key(id), token, {
    not_before_us = math.max(changes.not_before_us, changes.until_us), cooling = '1',
    hold_chain = authorization.chain, hold_us = now,
  })
  mirror(id, token, lease)
end

-- Ends the hold; what it held until then is in the token.
local function end_hold(token)
  redis.call('HDEL', token_key(id), 'hold_chain', 'hold_us')
  token.hold_chain, token.hold_us = nil, nil
end

local function answer(status, facts)
  facts = facts or {}
  facts.status = status
  return reply('OK', cmsgpack.pack(facts))
end
