-- Takes the right to request an access token, and counts the request in the budgets.
-- ask: chain, generation, attempt (its id), replica, takeover_us (after so long the right of
--      another is over), has_evidence, event (id), budgets
-- Answers BEGUN with `grant`; WAIT with `reason` and `until_us`; CHANGED with `grant`; or GONE.
local token = settle(id)
local grant = load_grant(id)
if not token or not is_kept(grant) then return answer('GONE') end
if grant.chain ~= ask.chain or grant.generation ~= ask.generation then return answer('CHANGED', {grant = grant}) end
local open = grant.attempt_step == 'BEGUN' or grant.attempt_step == 'INTENDED'
if open and grant.attempt ~= ask.attempt then
  local over = grant.attempt_begun_us + ask.takeover_us
  if sure < over then return answer('WAIT', {reason = 'REFRESHING', until_us = over_at(over), grant = grant}) end
  -- It may have been sent at its last possible moment, of which nobody told.
  if grant.attempt_step == 'INTENDED' then return answer('LOST', {grant = grant, over_us = over}) end
end
if sure < grant.not_before_us then
  return answer('WAIT', {reason = 'COOLING', until_us = over_at(grant.not_before_us), grant = grant})
end
local reason, until_us = held_by(token)
if reason then return answer('WAIT', {reason = reason, until_us = until_us, grant = grant}) end
local specs = {}
for i, spec in ipairs(ask.budgets) do
  specs[i] = counted_in(spec)
  local budget = load_budget(specs[i].id, specs[i])
  if room(budget) < 1 then
    return answer('WAIT', {reason = 'BUDGET_SPENT', until_us = room_at(specs[i].id, budget, 1), grant = grant})
  end
end
count_event(ask.event, now, 1, ask.budgets, id)
keep_grant(grant, {
  attempt = ask.attempt, attempt_replica = ask.replica, attempt_begun_us = now, attempt_step = 'BEGUN',
  attempt_outcome = '',
})
return answer('BEGUN', {grant = grant})
