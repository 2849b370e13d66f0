-- Add messages to their channels' sorted sets, trim these, and publish what is new.
--
-- KEYS: for each write, its channel's sorted set.
-- ARGV[1]: messages that are kept of a channel, at most 1000: so many fit into one command here.
-- ARGV[2]: seconds that a quiet channel is kept.
-- ARGV[3]: how to publish: PUBLISH, or in a cluster SPUBLISH, which reaches a slot's nodes only.
-- Then for each write: its pub/sub channel, or '' for a rebuild, which is not published; 1 where the
-- writer listens to that itself, else 0; how many messages; and these, each a number and a record.
-- What only the writer would hear is not published: it has it already. (-1: it is in any case.) Who listens at a cluster's
-- replica is not counted by the primary.
--
-- As in a pipeline, a command that is refused holds up no other: the first refusal is the answer,
-- with the command's name, which Redis 7 leaves out. Where it may not be asked who listens, all is
-- published.
local oldest, ttl, publish = -(tonumber(ARGV[1]) + 1), ARGV[2], ARGV[3]
local refused

local function call(...)
  local answer = redis.pcall(...)
  if type(answer) == 'table' and answer.err then
    refused = refused or {err = answer.err .. " by the '" .. string.lower((...)) .. "' command"}
  end
end

local function is_heard(live, besides)
  local answer = redis.pcall('PUBSUB', 'NUMSUB', live)
  return answer.err or answer[2] > besides
end

local at = 4
for _, key in ipairs(KEYS) do
  local live, first = ARGV[at], at + 3
  local last = first + 2 * ARGV[at + 2] - 1
  if live == '' then
    -- Another version of a message (its author has a new name) would keep an older one out.
    call('ZREMRANGEBYSCORE', key, ARGV[first], ARGV[last - 1])
  end
  call('ZADD', key, unpack(ARGV, first, last))
  call('ZREMRANGEBYRANK', key, 0, oldest)
  call('EXPIRE', key, ttl)
  if live ~= '' and (publish == 'SPUBLISH' or is_heard(live, tonumber(ARGV[at + 1]))) then
    for record = first + 1, last, 2 do
      call(publish, live, ARGV[record])
    end
  end
  at = last + 1
end

return refused or #KEYS
