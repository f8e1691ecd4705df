-- Stands before each script of custody: the grant record of a token, apart from its leases.
--
-- ARGV[7]  the request as MessagePack: a map with `token`, and what the script names
-- The answer is one MessagePack map with `status`, and what the script names. Instants are µs of
-- the store's clock.

local ask = cmsgpack.unpack(ARGV[7])
local id = ask.token
local GRANTS = SHARD .. ':grants' -- tokens in custody, by when to look at them

local function grant_key(token_id) return SHARD .. ':grant:' .. token_id end

local NUMBERS = {
  'generation', 'created_us', 'since_us', 'refreshed_us', 'not_before_us', 'expires_us', 'idle_us', 'unproven',
  'first_unproven_us', 'not_sent', 'attempt_begun_us',
}

-- The record of a grant: `sealed` is '' in a tombstone, which keeps what must not be forgotten.
-- A clock that went back took the last refresh with it.
local function load_grant(token_id)
  local grant = load(grant_key(token_id))
  if not grant.generation then return end
  for _, field in ipairs(NUMBERS) do grant[field] = number(grant[field]) end
  local ahead = grant.refreshed_us - now
  if ahead > 0 then
    grant.refreshed_us, grant.not_before_us = now, grant.not_before_us - ahead
  end
  return grant
end

local function is_kept(grant) return grant and grant.sealed ~= '' end

-- Writes fields of a grant, and when to look at it again.
local function keep_grant(grant, changes)
  put(grant_key(id), {}, changes)
  for field, value in pairs(changes) do grant[field] = value end
  if is_kept(grant) then redis.call('ZADD', GRANTS, us(grant.not_before_us), id) else redis.call('ZREM', GRANTS, id) end
end

-- What stands between a grant and its next request, apart from the grant itself: a reason, and
-- until when; nothing if nothing does.
local function held_by(token)
  if in_quarantine() and not ask.has_evidence then return 'QUARANTINED', quarantined_until() end
  if token.foreign then return 'LOCKED', now + SECOND end
  if cools(token) then return 'COOLING', over_at(number(token.not_before_us)) end
  local wait = wait_of('', subject_to(id, {{'', ''}}), false)
  if wait then return 'BACKING_OFF', wait.start end
end

local function answer(status, facts)
  facts = facts or {}
  facts.status = status
  return reply('OK', cmsgpack.pack(facts))
end
