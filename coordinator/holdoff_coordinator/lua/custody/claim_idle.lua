-- Takes the tokens that are due for a refresh although nothing uses them; others do not get them for a while.
-- ask: most (how many), again_us (after how long they are due again, unless they are refreshed)
-- Answers `tokens`.
local tokens = redis.call('ZRANGEBYSCORE', IDLING, '-inf', us(sure), 'LIMIT', 0, ask.most)
for _, one in ipairs(tokens) do redis.call('ZADD', IDLING, us(now + ask.again_us), one) end
return answer('OK', {tokens = tokens})
