-- Reads the authorization of a token. Answers OK with `authorization`, or GONE.
local found = load_authorization(id)
if not found then return answer('GONE') end
return answer('OK', {authorization = found})
