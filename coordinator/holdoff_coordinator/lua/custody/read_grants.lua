-- Reads grants. ask: tokens, sealed (whether to return the secrets, too)
-- Answers `grants`, an array of {id, grant, reason, until_us, now_us, interval_us, policy, quarantine, restored_us}: what
-- prevents the next request besides the grant; and when the store was restored, if the grant may be that of a backup. A token without a grant, or with a damaged one, is left out.
local grants = {}
for _, one in ipairs(ask.tokens) do
  spare('tokens/' .. one, function()
    id = one
    local grant, token, lease = load_grant(id), settle(id)
    if not is_kept(grant) or not token then return end
    local reason, until_us = held_by(token)
    if not ask.sealed then grant.sealed_grant, grant.sealed_access = nil, nil end
    grants[#grants + 1] = {
      id, grant, reason or '', until_us or 0, now, number(token.interval_us), token.policy or '', this_quarantine(),
      may_be_restored(grant) and number(shard.restored_us) or 0,
    }
  end)
end
return answer('OK', {grants = grants})
