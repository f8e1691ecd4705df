-- Reads grants. ask: tokens
-- Answers `grants`, an array of {id, flat record, held_reason, held_until_us}; what has no grant,
-- or is damaged, is left out.
local grants = {}
for _, one in ipairs(ask.tokens) do
  spare('tokens/' .. one, function()
    id = one
    local grant, token = load_grant(id), settle(id)
    if not is_kept(grant) or not token then return end
    local reason, until_us = held_by(token)
    grant.sealed = ask.sealed and grant.sealed or nil
    grants[#grants + 1] = {id, grant, reason or '', until_us or 0}
  end)
end
return answer('OK', {grants = grants})
