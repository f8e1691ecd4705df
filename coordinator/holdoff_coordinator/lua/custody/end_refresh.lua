-- Stores what came of a request: the whole answer, or what follows from having none.
-- ask: chain, from_generation, attempt, step, result, outcome, condition, message, unproven, first_unproven_us,
--      not_sent, idle_us (0 for none, -1 for no change); generation, and for a new one sealed_grant,
--      sealed_access, fingerprint and facts; restores, if it was stored before and may be lost; confirms, if
--      the replica knows of no newer one;
--      in µs from now, -1 for none: refreshed_age_us, not_before_in_us, expires_in_us
-- Answers OK, or MOVED with `grant` if another answer was stored meanwhile, or, for a result without
-- secrets, if its attempt was counted, or another one began.

-- Whether the last request was refused because its refresh token is dead, so that its pause does not
-- concern a newer one. Another refusal, and a request that was not sent, pause whatever comes next.
local function is_only_refused(grant)
  return grant.condition == 'REAUTHORIZE' and grant.attempt_step == 'NOT_ISSUED' and grant.not_sent == 0
end

local token, lease = settle(id)
local grant = load_grant(id)
if not token or not is_kept(grant) then return answer('GONE') end
local is_current = grant.chain == ask.chain and grant.attempt == ask.attempt
local is_under_way = is_current and (grant.attempt_step == 'BEGUN' or grant.attempt_step == 'INTENDED')
local has_secrets = ask.generation ~= ask.from_generation
if ask.restores and ask.confirms and grant.chain == ask.chain and grant.generation == ask.generation then
  -- The newest answer that a replica knows; the store has it.
  local ends_doubt = grant.condition == 'STALE' and not may_be_restored(grant)
  keep_grant(grant, {confirmed_us = now, condition = ends_doubt and ask.condition or grant.condition})
  return answer('OK', {grant = grant})
end
if is_current and not is_under_way and grant.generation == ask.generation and grant.attempt_step == ask.step then
  return answer('OK', {grant = grant}) -- the same request, sent again
end
local follows = grant.generation == ask.from_generation
if ask.restores and has_secrets then follows = grant.generation < ask.generation end
if grant.chain ~= ask.chain or not follows or not (has_secrets or is_under_way) then
  if is_under_way and ask.step == 'NOT_ISSUED' then
    keep_grant(grant, {attempt_step = ask.step, attempt_outcome = ask.outcome})
  end
  return answer('MOVED', {grant = grant})
end
local pause_us = grant.not_before_us
if ask.result == 'ISSUED' and not ask.restores and is_only_refused(grant) then
  pause_us = math.max(grant.refreshed_us + number(token.interval_us), number(token.not_before_us))
end
local not_before = math.max(pause_us, now + ask.not_before_in_us)
local changes = {
  condition = ask.condition, message = ask.message, generation = ask.generation,
  unproven = ask.unproven, first_unproven_us = ask.first_unproven_us, not_sent = ask.not_sent,
  not_before_us = not_before, since_us = ask.condition == grant.condition and grant.since_us or now,
}
if ask.restores and ask.confirms then changes.confirmed_us = now end
if grant.condition == 'STALE' and not ask.confirms then changes.condition = 'STALE' end
if has_secrets then
  changes.sealed_grant, changes.sealed_access = ask.sealed_grant, ask.sealed_access
  changes.facts, changes.evidence_us = ask.facts, ask.confirms and now or nil
  redis.call('HDEL', PRINTS, grant.fingerprint)
  redis.call('HSET', PRINTS, ask.fingerprint, id)
  changes.fingerprint = ask.fingerprint
end
if ask.expires_in_us >= 0 then changes.expires_us = now + ask.expires_in_us end
if is_current then changes.attempt_step, changes.attempt_outcome = ask.step, ask.outcome end
if ask.refreshed_age_us >= 0 then
  changes.refreshed_us = math.max(grant.refreshed_us, now - ask.refreshed_age_us)
  cool_down(id, token, changes.refreshed_us, number(token.interval_us))
end
if ask.idle_us >= 0 then
  local from = changes.refreshed_us or grant.refreshed_us
  changes.idle_us = ask.idle_us > 0 and from + ask.idle_us or 0
end
keep_grant(grant, changes)
mirror(id, token, lease)
audit('GRANT_REFRESHED', token_name(id), {
  reason = ask.outcome, result = ask.result, generation = grant.generation, replica = is_current and grant.attempt_replica,
})
redis.call('SPUBLISH', SHARD .. ':custody', id)
return answer('OK', {grant = grant})
