-- Stores what came of a request: the whole answer, or what follows from having none.
-- ask: chain, from_generation, attempt, step, outcome, condition, message, sealed ('' keeps it),
--      generation, unproven, first_unproven_us, not_sent; and as ages in µs, -1 for none:
--      refreshed_age_us, not_before_in_us, expires_in_us; idle_us
-- Answers OK, or MOVED with `grant` if another answer was stored meanwhile.
local token, lease = settle(id)
local grant = load_grant(id)
if not token or not is_kept(grant) then return answer('GONE') end
if grant.chain ~= ask.chain or grant.generation ~= ask.from_generation then return answer('MOVED', {grant = grant}) end
local not_before = math.max(grant.not_before_us, now + ask.not_before_in_us)
local changes = {
  condition = ask.condition, message = ask.message, generation = ask.generation,
  unproven = ask.unproven, first_unproven_us = ask.first_unproven_us, not_sent = ask.not_sent,
  not_before_us = not_before, since_us = ask.condition == grant.condition and grant.since_us or now,
}
if ask.sealed ~= '' then changes.sealed, changes.fingerprint = ask.sealed, ask.fingerprint end
if ask.expires_in_us >= 0 then changes.expires_us = now + ask.expires_in_us end
if grant.attempt == ask.attempt then changes.attempt_step, changes.attempt_outcome = ask.step, ask.outcome end
if ask.refreshed_age_us >= 0 then
  changes.refreshed_us = math.max(grant.refreshed_us, now - ask.refreshed_age_us)
  changes.idle_us = ask.idle_us > 0 and now + ask.idle_us or 0
  cool_down(id, token, changes.refreshed_us, math.max(0, not_before - changes.refreshed_us))
end
if changes.fingerprint and changes.fingerprint ~= grant.fingerprint then
  redis.call('HDEL', SHARD .. ':fingerprints', grant.fingerprint)
  redis.call('HSET', SHARD .. ':fingerprints', changes.fingerprint, id)
end
keep_grant(grant, changes)
mirror(id, token, lease)
audit('GRANT_REFRESHED', token_name(id), {reason = ask.step .. ': ' .. ask.outcome})
redis.call('SPUBLISH', SHARD .. ':custody', id)
return answer('OK', {grant = grant})
