-- Takes a grant into custody, or replaces it.
-- ask: chain, sealed, facts, fingerprint, etag_chain and etag_generation or replace, age_us of the
--      last refresh (-1 for never, 0 where it is not known), interval_us, idle_us
-- Answers OK, EXISTS, CHANGED, TOKEN_NOT_FOUND, IN_USE (a lease lives), or DUPLICATE with `of`: the
-- token that has this grant already.
local token, lease = settle(id)
if not token then return answer('TOKEN_NOT_FOUND') end
local grant = load_grant(id)
if is_kept(grant) and not ask.replace then
  if not ask.etag_chain then return answer('EXISTS') end
  if grant.chain ~= ask.etag_chain or grant.generation ~= ask.etag_generation then return answer('CHANGED') end
elseif not is_kept(grant) and ask.etag_chain then
  return answer('CHANGED')
end
if not is_kept(grant) and (lease or token.foreign) then return answer('IN_USE') end
local prints = SHARD .. ':fingerprints'
local other = redis.call('HGET', prints, ask.fingerprint)
if other and other ~= id then return answer('DUPLICATE', {of = other}) end

grant = grant or {generation = 0, refreshed_us = 0, not_before_us = 0}
if grant.fingerprint then redis.call('HDEL', prints, grant.fingerprint) end
redis.call('HSET', prints, ask.fingerprint, id)
if ask.age_us >= 0 then
  local refreshed = math.max(grant.refreshed_us, now - ask.age_us)
  cool_down(id, token, refreshed, ask.interval_us)
  grant.refreshed_us = refreshed
end
keep_grant(grant, {
  chain = ask.chain, generation = grant.generation + 1, sealed = ask.sealed, facts = ask.facts,
  fingerprint = ask.fingerprint, condition = 'READY', message = '', created_us = now, since_us = now,
  refreshed_us = grant.refreshed_us, not_before_us = math.max(grant.not_before_us, number(token.not_before_us)),
  expires_us = 0, idle_us = ask.idle_us > 0 and now + ask.idle_us or 0,
  unproven = 0, first_unproven_us = 0, not_sent = 0,
  attempt = '', attempt_replica = '', attempt_begun_us = 0, attempt_step = '', attempt_outcome = '',
})
mirror(id, token, lease)
audit('GRANT_PUT', token_name(id), {reason = ask.replace and 'replaced' or ''}, true)
return answer('OK')
