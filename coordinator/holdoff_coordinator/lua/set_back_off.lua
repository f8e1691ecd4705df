-- Makes a scope quiet because an operator wishes it.
-- ARGV 7   back-off id
-- ARGV 8   length in µs
-- ARGV 9   JSON: token, division, endpoint, spelled, reason, user, host, job
local facts = cjson.decode(ARGV[9])
facts.spelled = spelling(facts.token, facts.endpoint, facts.spelled)
facts.cause, facts.kind, facts.probes = 'OPERATOR', '', '1'
facts.since_us, facts.until_us = now, now + number(ARGV[8])
be_quiet(ARGV[7], facts)
return reply('OK', shown_back_off(back_off_record(ARGV[7])))
