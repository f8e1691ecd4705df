-- Changes a token's rules; a cooldown that runs is never shortened.
-- ARGV 7.. as for create_token.lua, up to the access token life, then the
--         token's `updated_us` when the new rules were worked out from its own
local id = ARGV[7]
local token, lease = settle(id)
if not token then return reply('TOKEN_NOT_FOUND') end
if token.updated_us ~= ARGV[14] then return reply('TOKEN_CHANGED') end
put(token_key(id), token, {
  policy = ARGV[8], own_interval_us = ARGV[9], own_refresh_at = ARGV[10],
  interval_us = ARGV[11], refresh_at = ARGV[12], access_token_life_us = ARGV[13],
  updated_us = now,
})
if token.last_refresh_us then
  cool_down(id, token, number(token.last_refresh_us), number(token.interval_us))
end
local held = lease and lease.state == 'ACTIVE'
if held or token.foreign then note_hold((held and number(lease.ttl_us) or 0) + number(token.interval_us)) end
mirror(id, token, lease) -- a longer interval has to outlast a live lease too
tell('TOKEN_UPDATED', id, token, token.lease, lease)
audit('TOKEN_UPDATED', token_name(id), {reason = 'policy ' .. ARGV[8] .. ', interval ' .. ARGV[11] .. ' µs'}, true)
return reply('OK')
