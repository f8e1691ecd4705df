-- Finds out which commands an access list forbids us. Alone: no other part stands before it.
-- KEYS[1]  a key to read and to write; what is there is gone
-- Answers the commands that are forbidden, in lower case.
local key = KEYS[1]

local function is_forbidden(command)
  local answer = redis.pcall(unpack(command))
  local text = type(answer) == 'table' and answer.err or ''
  -- The words of Valkey, then those of Redis. What else goes wrong is not of interest here.
  return text:find('to run the') or text:find("can't run this command")
end

local forbidden = {}
for _, command in ipairs({
  {'DEL', key}, {'SET', key, '1', 'PX', '1000'}, {'GET', key}, {'EXISTS', key}, {'TTL', key}, {'PTTL', key},
  {'EXPIRE', key, '1'}, {'PEXPIRE', key, '1000'},
  {'HSET', key, 'a', '1'}, {'HGET', key, 'a'}, {'HMGET', key, 'a'}, {'HGETALL', key}, {'HDEL', key, 'a'},
  {'HINCRBY', key, 'a', '1'}, {'HLEN', key}, {'HSTRLEN', key, 'a'},
  {'LPUSH', key, '1'}, {'LRANGE', key, '0', '0'}, {'RPOP', key},
  {'SADD', key, 'a'}, {'SMEMBERS', key},
  {'ZADD', key, '1', 'a'}, {'ZINCRBY', key, '1', 'a'}, {'ZCARD', key}, {'ZPOPMIN', key}, {'ZRANGE', key, '0', '0'},
  {'ZRANGEBYLEX', key, '-', '+'}, {'ZRANGEBYSCORE', key, '0', '0'}, {'ZRANK', key, 'a'}, {'ZREM', key, 'a'},
  {'ZREMRANGEBYRANK', key, '0', '0'}, {'ZREMRANGEBYSCORE', key, '0', '0'}, {'ZSCORE', key, 'a'},
  {'XADD', key, '*', 'a', '1'}, {'XDEL', key, '1-1'}, {'XRANGE', key, '-', '+'}, {'XREVRANGE', key, '+', '-'},
  {'SPUBLISH', key, ''}, {'TIME'}, {'INFO', 'replication'},
}) do
  if is_forbidden(command) then forbidden[#forbidden + 1] = command[1]:lower() end
end
redis.pcall('DEL', key)
return forbidden
