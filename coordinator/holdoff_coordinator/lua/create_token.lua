-- Creates a token.
-- ARGV 7.. token id, policy, own interval µs ('' none), own refresh_at ('' none),
--         interval µs, refresh_at, access token life µs, age of the last refresh
--         in µs ('' for never)
local id = ARGV[7]
ensure_epoch()
local key = token_key(id)
if redis.call('EXISTS', key) == 1 then return reply('TOKEN_EXISTS') end
local token = {}
put(key, token, {
  policy = ARGV[8], own_interval_us = ARGV[9], own_refresh_at = ARGV[10],
  interval_us = ARGV[11], refresh_at = ARGV[12], access_token_life_us = ARGV[13],
  created_us = now, updated_us = now, fencing = '0',
})
redis.call('ZADD', SHARD .. ':tokens', 0, id)
-- What custody knows outlives the token, which may have been removed from the store by hand.
local grant = load(SHARD .. ':grant:' .. id)
local refreshed = math.min(now, number(grant.refreshed_us))
if grant.sealed_grant and grant.sealed_grant ~= '' then
  put(key, token, {custody_us = now, mirror = shared.LOCK, mirror_until_us = 0})
end
if refreshed > 0 then cool_down(id, token, refreshed, number(ARGV[11])) end
if ARGV[14] ~= '' then cool_down(id, token, now - number(ARGV[14]), number(ARGV[11])) end
settle(id)
tell('TOKEN_CREATED', id, token)
audit('TOKEN_CREATED', token_name(id), {reason = 'policy ' .. ARGV[8]}, true)
return reply('OK')
