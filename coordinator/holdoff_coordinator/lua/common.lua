-- Stands before every other script. Loads the shard (all keys of one app), and
-- watches the clock and the epoch.
--
-- KEYS[1]  holdoff:{app}, the shard; every other key starts with it or carries
--          the same hash tag, so that a script stays in one slot
-- ARGV[1]  the replica's estimate of the store's time, in µs; '' if it has none
-- ARGV[2]  the shard's epoch as the replica knows it; '' if it knows none
-- ARGV[3]  a fresh id, the epoch to give to a shard that has none
-- ARGV[4]  least length of a quarantine in µs
-- ARGV[5]  who called, and ARGV[6] from where; '' for what nobody called for
--
-- All times are µs of this server's clock; below 2^53 they are exact in Lua.

local SECOND = 1000000
local CLOCK_TOLERANCE = 1 * SECOND -- design, issue: a second in either direction
local LIVE_FOR = 5 * SECOND -- a waiter is live this long after it was heard
local OUTAGE_AFTER = 2 * SECOND -- replicas come by every second
local RECOVERY = 5 * SECOND -- after an outage waiters may return first
local SCHEMA = 3 -- of all records; `upgrade` below knows the older ones

local SHARD = KEYS[1]
local DUE = SHARD .. ':due'
local time = redis.call('TIME')
local now = tonumber(time[1]) * SECOND + tonumber(time[2])

local function us(number) return string.format('%.0f', number) end

local function number(text) return tonumber(text or '0') end

local function load(key)
  local flat = redis.call('HGETALL', key)
  local record = {}
  for i = 1, #flat, 2 do record[flat[i]] = flat[i + 1] end
  return record
end

local function token_key(id) return SHARD .. ':token:' .. id end
local function queue_key(id) return SHARD .. ':queue:' .. id end
local function history_key(id) return SHARD .. ':history:' .. id end
local function lock_key(id) return 'lock:' .. SHARD .. ':' .. id end
local function signal_key(id) return 'lock-signal:' .. SHARD .. ':' .. id end
local function request_key(hash) return SHARD .. ':request:' .. hash end
local function lease_key(id, lease) return SHARD .. ':lease:' .. id .. ':' .. lease end

local shard = load(SHARD)
local epoch = shard.epoch

local NAME = 'apps/' .. SHARD:match('{(.*)}')
local AUDIT_KEPT = 10000 -- entries an app, some 5 MB
local audited = {} -- what this call added to the trail, for the log

-- Adds to the audit trail what happened to a thing, by its name below the app. The caller is
-- named if it was its doing.
local function audit(kind, thing, facts, by_caller)
  local entry = {'kind', kind, 'resource', NAME .. thing}
  if by_caller then facts.identity, facts.peer = ARGV[5], ARGV[6] end
  for _, field in ipairs({
    'identity', 'peer', 'holder', 'job', 'host', 'user', 'reason', 'cause', 'limit', 'status',
    'token', 'division', 'endpoint', 'waited_us', 'handover_us',
  }) do
    if facts[field] and facts[field] ~= '' then
      entry[#entry + 1] = field
      entry[#entry + 1] = type(facts[field]) == 'number' and us(facts[field]) or facts[field]
    end
  end
  local key = SHARD .. ':audit'
  local id = redis.pcall('XADD', key, 'MAXLEN', '~', AUDIT_KEPT, '*', unpack(entry))
  if type(id) == 'table' then
    redis.call('DEL', key) -- it is not ours
    id = redis.call('XADD', key, '*', unpack(entry))
  end
  audited[#audited + 1] = {id, entry}
end

-- How long after its last renewal a holder's last refresh may still matter.
local function longest_hold() return number(shard.longest_ttl_us) + number(shard.longest_interval_us) end

local damaged = {} -- {thing, why} of the records that this call could not use

-- Does something for one thing of many and returns what that gives; nothing if the thing's
-- record is damaged, which is reported. Trouble of the whole store ends the script.
local function spare(thing, act, ...)
  local function result(well, ...)
    if well then return ... end
    local why = ...
    local text = type(why) == 'table' and why.err or tostring(why)
    local code = text:match('^(%u+) ')
    local denied = text:find('ACL failure', 1, true) or text:find('The user executing the script', 1, true)
    if denied or (code and code ~= 'WRONGTYPE' and code ~= 'ERR') then error(why) end
    damaged[#damaged + 1] = {thing, text}
  end
  return result(pcall(act, ...))
end

local function reply(status, ...)
  return {us(now), epoch or '', us(longest_hold()), {audited, damaged, shard.history or ''}, status, ...}
end

local function put(key, record, changes)
  local flat = {}
  for field, value in pairs(changes) do
    value = type(value) == 'number' and us(value) or value
    record[field] = value
    flat[#flat + 1] = field
    flat[#flat + 1] = value
  end
  redis.call('HSET', key, unpack(flat))
end

local function quarantine(why)
  local safe = math.max(number(ARGV[4]), longest_hold())
  if now >= number(shard.quarantine_until_us) then audit('QUARANTINE_BEGAN', '', {reason = why}) end
  put(SHARD, shard, {
    quarantine_until_us = math.max(number(shard.quarantine_until_us), now + safe),
    quarantine_reason = why,
  })
end

-- Called by the only script that makes a shard.
local function ensure_epoch()
  if epoch then return end
  epoch = ARGV[3]
  redis.call('DEL', SHARD .. ':changes')
  put(SHARD, shard, {epoch = epoch, schema = SCHEMA, changes = 0, tick_us = now, service_us = 0, high_water_us = now})
  if ARGV[2] ~= '' then quarantine('the store lost the data of this app') end
end

-- Schema 1 did not know who waits and since when, nor whether a cooldown's end
-- was told; schema 2 knew no back-offs, so that its coordinators would not keep them.
local function upgrade_from_1()
  local function upgrade_token(id)
    local token = load(token_key(id))
    if number(token.not_before_us) > now then put(token_key(id), token, {cooling = '1'}) end
    for _, hash in ipairs(redis.call('ZRANGE', queue_key(id), 0, -1)) do
      local request = load(request_key(hash))
      if request.state then put(request_key(hash), request, {holder = '', queued_us = now}) end
    end
  end
  for _, id in ipairs(redis.call('ZRANGE', SHARD .. ':tokens', 0, -1)) do
    spare('tokens/' .. id, upgrade_token, id)
  end
  put(SHARD, shard, {changes = 0})
end

local found_schema = number(shard.schema or '1')
if epoch and found_schema > SCHEMA then
  return reply('SCHEMA_TOO_NEW', us(found_schema), us(SCHEMA))
elseif epoch and found_schema < SCHEMA then
  if found_schema < 2 then upgrade_from_1() end
  put(SHARD, shard, {schema = SCHEMA})
end

if epoch then
  if ARGV[2] ~= '' and ARGV[2] ~= epoch then quarantine('the epoch of the store changed') end
  if now < number(shard.high_water_us) - CLOCK_TOLERANCE then
    quarantine('the clock of the store went back')
  end
  -- A replica that was promoted may lack the last writes, as may a server that began from a
  -- snapshot. Both go on with a history of writes of their own, after that of the server
  -- before. A managed store may refuse to tell.
  local info = redis.pcall('INFO', 'replication')
  local history = type(info) == 'string' and info:match('master_replid:(%x+)')
  if history and history ~= shard.history then
    if shard.history and info:find('master_replid2:' .. shard.history, 1, true) then
      quarantine('another server of the store took over, and may lack the last writes')
    end
    put(SHARD, shard, {history = history})
  end
  -- `service_us` is a clock that stands still while no coordinator comes by.
  local gap = now - number(shard.tick_us)
  local changes = {tick_us = now, high_water_us = now}
  if gap > OUTAGE_AFTER then
    changes.recovery_until_us = now + RECOVERY
  elseif gap > 0 then
    changes.service_us = number(shard.service_us) + gap
  end
  put(SHARD, shard, changes)
end

-- A replica whose own clock disagrees gets no grant; it then measures, and
-- declares the quarantine if the disagreement is real.
local clock_in_doubt = ARGV[1] ~= '' and math.abs(now - tonumber(ARGV[1])) > CLOCK_TOLERANCE

local function quarantined_until()
  return math.max(number(shard.quarantine_until_us), clock_in_doubt and now + SECOND or 0)
end
