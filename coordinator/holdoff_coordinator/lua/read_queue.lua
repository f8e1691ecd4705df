-- Reads who waits for a token, in order.
-- ARGV 7   token id
-- Answers one request a waiter.
local id = ARGV[7]
if not settle(id) then return reply('TOKEN_NOT_FOUND') end
local found = {}
walk_queue(id, function(hash) found[#found + 1] = redis.call('HGETALL', request_key(hash)) end)
return reply('OK', found)
