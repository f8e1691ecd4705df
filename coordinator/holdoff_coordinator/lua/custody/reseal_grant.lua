-- Replaces the sealed secrets of a grant by the same secrets, sealed with another key.
-- ask: chain, generation, sealed_grant, sealed_access, facts
-- Answers OK; GONE; or CHANGED if the secrets are other ones by now.
local grant = load_grant(id)
if not is_kept(grant) then return answer('GONE') end
if grant.chain ~= ask.chain or grant.generation ~= ask.generation then return answer('CHANGED') end
keep_grant(grant, {sealed_grant = ask.sealed_grant, sealed_access = ask.sealed_access, facts = ask.facts})
return answer('OK')
