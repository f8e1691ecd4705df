-- Takes a grant into custody, or replaces it.
-- ask: chain, generation (the one that the secrets were sealed for), sealed_grant, facts, fingerprint,
--      age_us of the last refresh, idle_us (0 for none), takeover_us; and etag_chain with
--      etag_generation, or replace, or neither; or attempt, whose authorization this completes, with sealed_access
--      and expires_in_us (0 for none)
-- Answers OK; GONE, if the authorization is not the last one; TOKEN_NOT_FOUND; EXISTS; CHANGED; WAIT with `reason` and `until_us`; DUPLICATE with `of`,
-- the token that has this grant; or MOVED with `generation`: seal for that one, and ask again.
local token, lease = settle(id)
if not token then return answer('TOKEN_NOT_FOUND') end
local grant = load_grant(id)
local kept, over = is_kept(grant), right_until(grant)
local authorization = load_authorization(id)
if kept and grant.chain == ask.chain then return answer('OK') end -- the same request, sent again
local completes = authorization and authorization.chain == ask.chain and authorization.attempt == ask.attempt
if ask.attempt then
  local is_kept_one = completes and authorization.kept_chain == (kept and grant.chain or '')
  -- An answer that comes when the right is over is older than what was stored since.
  local moved = completes and kept and grant.generation > number(authorization.kept_generation)
  if not is_kept_one or (moved and not exchange_until(authorization)) then return answer('GONE') end
end
if not authorization or authorization.step ~= 'INTENDED' or completes then free_cooldown(token, authorization) end
if ask.etag_chain and not (kept and is_meant(grant)) then return answer('CHANGED') end
if kept and not ask.replace and not ask.etag_chain and not completes then return answer('EXISTS') end

local function wait(reason, until_us) return answer('WAIT', {reason = reason, until_us = until_us}) end
if not completes then -- else it has the right
  if in_quarantine() then return wait('QUARANTINED', quarantined_until()) end
  if lease then return wait('LEASED', number(lease.expires_us)) end
  if token.foreign then return wait('LOCKED', now + SECOND) end
  over = exchange_until(authorization) or over
  if over and sure < over then return wait('REFRESHING', over_at(over)) end
  if not kept and cools(token) then return wait('COOLING', over_at(number(token.not_before_us))) end
end

local other = redis.call('HGET', PRINTS, ask.fingerprint)
if other and other ~= id and redis.pcall('HGET', grant_key(other), 'fingerprint') == ask.fingerprint then
  return answer('DUPLICATE', {of = other})
end
grant = grant or {generation = 0, refreshed_us = 0}
local generation = grant.generation + 1
if ask.generation ~= generation then return answer('MOVED', {generation = generation}) end

if grant.fingerprint then redis.call('HDEL', PRINTS, grant.fingerprint) end
redis.call('HSET', PRINTS, ask.fingerprint, id)
local refreshed = math.max(grant.refreshed_us, lost_at(grant), now - ask.age_us)
cool_down(id, token, refreshed, number(token.interval_us))
-- A refresh token that must not be sent yet must not be either when it is put again.
local is_same = ask.fingerprint == grant.fingerprint or ask.fingerprint == grant.past_print
local not_before = math.max(number(token.not_before_us), is_same and grant.not_before_us or 0)
keep_grant(grant, {
  chain = ask.chain, generation = generation, sealed_grant = ask.sealed_grant,
  sealed_access = ask.sealed_access or '', expires_us = (ask.expires_in_us or 0) > 0 and now + ask.expires_in_us or 0,
  facts = ask.facts, fingerprint = ask.fingerprint, past_print = '', claim = ask.fingerprint, condition = 'READY', message = '',
  created_us = now, since_us = now, refreshed_us = refreshed, not_before_us = not_before,
  idle_us = ask.idle_us > 0 and refreshed + ask.idle_us or 0,
  unproven = 0, first_unproven_us = 0, not_sent = 0, confirmed_us = 0, evidence_us = 0,
  attempt = '', attempt_replica = '', attempt_begun_us = 0, attempt_step = '', attempt_outcome = '',
})
put(token_key(id), token, {custody_us = kept and token.custody_us or now})
mirror(id, token, lease)
wake_next(id)
if authorization then end_hold(token) end
if completes then
  redis.call('HDEL', authorization_key(id), 'sealed')
  put(authorization_key(id), authorization, {step = 'DONE'})
  redis.call('PEXPIRE', authorization_key(id), us(600 * SECOND / 1000))
elseif authorization then
  redis.call('DEL', authorization_key(id))
end
audit('GRANT_PUT', token_name(id), {reason = completes and 'authorized' or kept and 'replaced' or ''}, true)
redis.call('SPUBLISH', SHARD .. ':custody', id)
return answer('OK')
