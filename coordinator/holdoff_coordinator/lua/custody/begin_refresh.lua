-- Takes the right to request an access token, and counts the request in the budgets.
-- ask: chain, generation, attempt (its id), replica, takeover_us (after so long the right of
--      another is over), quarantine (in which there is evidence), event (id), budgets; fears: after which loss this refresh token
--      must not be sent, since there may be a newer one: DATA (a restore), WRITES (also a failover), or ''
-- Answers BEGUN with `grant`; WAIT with `reason` and `until_us`; CHANGED with `grant`; GONE; LOST with
-- `over_us`: the last request may have been answered until then, and nothing is known of it; or STALE.
local token, lease = settle(id)
local grant = load_grant(id)
if not token or not is_kept(grant) then return answer('GONE') end
if grant.chain ~= ask.chain or grant.generation ~= ask.generation then return answer('CHANGED', {grant = grant}) end
local over = right_until(grant)
if over and grant.attempt ~= ask.attempt then
  if sure < over then return answer('WAIT', {reason = 'REFRESHING', until_us = over_at(over), grant = grant}) end
  if lost_at(grant) > 0 then return answer('LOST', {grant = grant, over_us = over}) end
end
if sure < grant.not_before_us then
  return answer('WAIT', {reason = 'COOLING', until_us = over_at(grant.not_before_us), grant = grant})
end
local reason, until_us = held_by(token)
if reason then return answer('WAIT', {reason = reason, until_us = until_us, grant = grant}) end
local is_doubtful = ask.fears ~= '' and may_be_restored(grant)
if is_doubtful or (ask.fears == 'WRITES' and may_be_behind(grant)) then
  keep_grant(grant, {condition = 'STALE', message = '', since_us = now})
  audit('GRANT_REFRESHED', token_name(id), {
    reason = 'the store may have lost a newer refresh token', result = 'STALE', generation = grant.generation,
    replica = ask.replica,
  })
  redis.call('SPUBLISH', SHARD .. ':custody', id)
  return answer('STALE', {grant = grant})
end
local spent = spent_until()
if spent then return answer('WAIT', {reason = 'BUDGET_SPENT', until_us = spent, grant = grant}) end
count_event(ask.event, now, 1, ask.budgets, id)
keep_grant(grant, {
  attempt = ask.attempt, attempt_replica = ask.replica, attempt_begun_us = now, attempt_step = 'BEGUN',
  attempt_outcome = '',
})
redis.call('SPUBLISH', SHARD .. ':custody', id)
return answer('BEGUN', {grant = grant})
