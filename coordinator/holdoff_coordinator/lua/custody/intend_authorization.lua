-- Says that the code is about to be sent, and counts the request. From then on it counts as answered at the
-- last possible moment, until its result is stored.
-- ask: chain, attempt (its id), takeover_us, event (id), budgets
-- Answers OK; GONE; or WAIT with `reason` and `until_us`.
local token, lease = settle(id)
local grant, authorization = load_grant(id), load_authorization(id)
local chain = is_kept(grant) and grant.chain or ''
if not token or not authorization or authorization.chain ~= ask.chain or authorization.kept_chain ~= chain then
  return answer('GONE')
end
if authorization.step ~= 'PENDING' then -- the same request, sent again, or another one
  return answer(authorization.attempt == ask.attempt and 'OK' or 'GONE')
end
if sure >= authorization.valid_us then return answer('GONE') end
free_cooldown(token, authorization)
local reason, until_us = held_by(token)
if lease then reason, until_us = 'LEASED', number(lease.expires_us) end
if not reason then
  until_us = spent_until()
  reason = until_us and 'BUDGET_SPENT'
end
if reason then return answer('WAIT', {reason = reason, until_us = until_us}) end
count_event(ask.event, now, 1, ask.budgets, id)
hold_cooldown(token, lease, authorization, {
  step = 'INTENDED', attempt = ask.attempt, begun_us = now, kept_generation = grant and grant.generation or 0,
  until_us = now + ask.takeover_us + number(token.interval_us),
})
redis.call('PEXPIRE', authorization_key(id), us(24 * CLOCK_SLACK / 1000))
return answer('OK')
