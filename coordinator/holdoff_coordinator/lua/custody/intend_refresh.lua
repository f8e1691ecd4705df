-- Says that the request is about to be sent, so that it counts as sent from now on.
-- ask: chain, generation, attempt
-- Answers OK, or LOST if the right is another's by now.
local grant = load_grant(id)
local mine = is_kept(grant) and grant.chain == ask.chain and grant.generation == ask.generation
if not mine or grant.attempt ~= ask.attempt then return answer('LOST') end
if grant.attempt_step == 'INTENDED' then return answer('OK') end -- the same request, sent again
if grant.attempt_step ~= 'BEGUN' then return answer('LOST') end
keep_grant(grant, {attempt_step = 'INTENDED'})
return answer('OK')
