-- Makes a scope quiet because an operator wishes it.
-- ARGV 5   back-off id
-- ARGV 6   length in µs
-- ARGV 7   JSON: token, division, endpoint, reason, user, host, job
local facts = cjson.decode(ARGV[7])
facts.cause, facts.kind, facts.probes = 'OPERATOR', '', '1'
facts.since_us, facts.until_us = now, now + number(ARGV[6])
be_quiet(ARGV[5], facts)
return reply('OK', shown_back_off(back_off_record(ARGV[5])))
